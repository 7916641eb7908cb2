"""The program of a run: the state and the functions of a step, for the devices of a mesh."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tnt_jax.config import TrainConfig
from tnt_jax.models.variants import abstract_model
from tnt_jax.tasks.losses import Objective
from tnt_jax.training.distillation import Teacher
from tnt_jax.training.mesh import on_mesh, over_batch, replicated, shardings_of
from tnt_jax.training.objective import objective_of
from tnt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tnt_jax.training.step import TrainState, init_state, make_eval_step, make_train_step


class Program:
    """The jitted functions of a run, and the shapes and shardings of what they take.

    Nothing is computed, and no data is needed. The devices may be those of a machine that is not there: such a step
    can be compiled, `program.train_step.lower(program.abstract_state, program.abstract_batch).compile()`.

    Args:
        config: its model is resolved, and its batch can be divided among the devices.
        teacher: of a distillation. A plan leaves it out.
        objective: by default that of the configuration, without what the training targets say.
    """

    abstract_state: TrainState
    """Shapes, dtypes and shardings of the state."""
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    """The same of a training batch."""
    init: Callable[[dict], TrainState]
    """Parameters to the state before the first step, on all devices."""
    train_step: Callable[[TrainState, dict], tuple[TrainState, dict]]
    """As `make_train_step` has it. The memory of the state that is given is used again."""
    objective: Objective
    """The loss that the steps minimise, and the scores."""
    eval_step: Callable[[dict[str, dict], dict], dict]
    """As `make_eval_step` has it."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        steps_per_epoch: int,
        objective: Objective | None = None,
        teacher: Teacher | None = None,
    ):
        objective = self.objective = objective or objective_of(config)
        schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=steps_per_epoch, epochs=config.epochs)
        optimizer = make_optimizer(config.optimizer, schedule, config.freeze)
        graphdef, params = nnx.split(abstract_model(config.model))
        own = nnx.to_pure_dict(params)
        abstract = jax.eval_shape(lambda params: init_state(params, optimizer), own)
        shardings = shardings_of(abstract, mesh)
        self.abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
        images = (config.batch_size, *config.model.image_size, config.model.in_channels)
        label = objective.task.label_shape(config.model.num_classes, config.model.image_size)
        self.abstract_batch = {
            "image": jax.ShapeDtypeStruct(images, np.uint8, sharding=over_batch(mesh)),
            "label": jax.ShapeDtypeStruct((images[0], *label), objective.task.label_dtype, sharding=over_batch(mesh)),
        }
        if teacher:
            self.abstract_batch["teacher"] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), teacher.params
            )
        step = make_train_step(graphdef, own, optimizer, schedule, config, objective, teacher)
        self.init = jax.jit(lambda params: init_state(params, optimizer), out_shardings=shardings)
        self.train_step = jax.jit(
            on_mesh(mesh, step, config.precision),
            donate_argnums=0,
            out_shardings=(shardings, replicated(mesh)),
        )
        # To every device, so that each process has the rows of all.
        self.eval_step = jax.jit(
            on_mesh(mesh, make_eval_step(graphdef, own, config.data, objective)), out_shardings=replicated(mesh)
        )
