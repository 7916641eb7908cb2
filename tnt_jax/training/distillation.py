"""A teacher: another model whose logits for the same augmented images are targets beside those of the data.

Sources: Hinton et al., arXiv 1503.02531 (soft); Touvron et al., arXiv 2012.12877, equations 1 and 2 (soft and hard).
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tnt_jax.config import DistillConfig, InputError, TrainConfig
from tnt_jax.data.classes import match_classes
from tnt_jax.data.mixing import Images, Normalisation
from tnt_jax.storage.description import Preprocessing, description_of
from tnt_jax.storage.load import load_model
from tnt_jax.tasks.table import TASKS
from tnt_jax.training.mesh import shardings_of

Logits = Float[Array, "batch classes"]


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A model that is not trained, with its parameters on the devices of a run."""

    graphdef: nnx.GraphDef
    params: nnx.State
    preprocessing: Preprocessing
    classes: np.ndarray
    """Those of the data among its own, int (classes,)."""

    def logits(self, params: nnx.State, images: Images, fed_by: Normalisation) -> Logits:
        """The teacher's logits for a training batch, at its own size and with its own normalisation, in float32."""
        pixels = images * jnp.array(fed_by.std) + jnp.array(fed_by.mean)
        if images.shape[1:3] != (size := self.preprocessing.image_size):
            pixels = jax.image.resize(pixels, (len(images), *size, images.shape[3]), "cubic", antialias=True)
        inputs = (pixels - jnp.array(self.preprocessing.mean)) / jnp.array(self.preprocessing.std)
        logits = nnx.merge(self.graphdef, params)(inputs).astype(jnp.float32)
        return jax.lax.stop_gradient(logits[:, self.classes])

    def digest(self) -> str:
        """Of its parameters: another teacher under the same name is another run."""
        found = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(self.params)):
            found.update(jax.tree_util.keystr(path).encode())
            found.update(np.asarray(jax.device_get(leaf), np.float32).tobytes())
        return found.hexdigest()


def open_teacher(config: TrainConfig, class_names: Sequence[str], mesh: Mesh) -> Teacher | None:
    """The teacher of a run, sharded as the student; None where it has none.

    Args:
        class_names: of the data.

    Raises:
        InputError: there is no such model, or its task, classes or channels are not those of the run.
    """
    name = config.distill.teacher
    if name is None:
        return None
    if not TASKS[config.data.task].one_class:
        right = " or ".join(task for task, each in TASKS.items() if each.one_class)
        raise InputError(f"distill.teacher was given, and data.task is {config.data.task}; a teacher is for {right}")
    model = load_model(name)
    described = description_of(model)
    if described.outputs.task != config.data.task:
        raise InputError(f"the teacher {name} is of task {described.outputs.task}, and the run of {config.data.task}")
    if model.config.in_channels != config.model.in_channels:
        raise InputError(
            f"the teacher {name} takes images of {model.config.in_channels} channels, and model.in_channels is "
            f"{config.model.in_channels}"
        )
    try:
        match = match_classes(described.class_names, model.config.num_classes, class_names, config.data.source)
    except InputError as error:
        raise InputError(f"the teacher {name} has other classes: {error}") from error
    graphdef, params = nnx.split(model)
    params = jax.tree.map(jax.device_put, params, shardings_of(params, mesh))
    return Teacher(graphdef, params, described.preprocessing, np.asarray(match.of_model))


def distillation_loss(config: DistillConfig, logits: Logits, of_teacher: Logits) -> Float[Array, ""]:
    """The distance of the student from its teacher, the mean over the batch: 0 where a soft one says the same."""
    logits = logits.astype(jnp.float32)
    if config.kind == "hard":
        return optax.softmax_cross_entropy_with_integer_labels(logits, of_teacher.argmax(-1)).mean()
    student, teacher = (jax.nn.log_softmax(each / config.temperature) for each in (logits, of_teacher))
    return config.temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher).mean()
