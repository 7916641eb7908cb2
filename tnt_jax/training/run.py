"""A run as its configuration determines it: data, devices, and the functions of a step, which no step changes."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from tnt_jax.config import ModelChanges, TrainConfig, check
from tnt_jax.data.check import check_splits, content_of
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import Batch, eval_batches, steps_per_epoch, train_batches
from tnt_jax.models.variants import abstract_model, build_model, complete, resolve
from tnt_jax.storage.checkpoint import Checkpoints
from tnt_jax.storage.folder import model_from_parameters
from tnt_jax.storage.load import open_for
from tnt_jax.tasks.table import TASKS
from tnt_jax.training.distillation import open_teacher
from tnt_jax.training.mesh import check_batch_size, make_mesh, rows_of_process, to_devices
from tnt_jax.training.objective import objective_of
from tnt_jax.training.optimizer import learning_rate_schedule
from tnt_jax.training.program import Program
from tnt_jax.training.report import check_wandb
from tnt_jax.training.step import TrainState


def saved_trees(state: TrainState) -> dict[str, dict]:
    """The part of a state that a checkpoint holds, beside its step."""
    return {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}


class Run:
    """A run as its configuration determines it: data, devices, and the functions of a step, which no step changes.

    Raises:
        InputError: something in the configuration is wrong.
    """

    def __init__(self, config: TrainConfig[ModelChanges]):
        data = config.data
        # Before any data is opened; the model is complete when its classes are known.
        check(config)
        resolve(config.model)
        check_wandb(config)
        self.train_source, self.test_source = (open_split(data, split) for split in (data.train_split, None))
        self.config = complete(config, len(self.train_source.class_names))
        self._dtypes = check_splits(self.train_source, self.test_source, data, self.config.model.in_channels)
        self.mesh = make_mesh(config.fsdp)
        check_batch_size(config.batch_size, self.mesh, config.accumulation_steps)
        self.steps_per_epoch = steps_per_epoch(len(self.train_source), data, config.batch_size)
        self.total_steps = (config.epochs + config.optimizer.cooldown_epochs) * self.steps_per_epoch
        self.steps_between_evaluations = config.eval_every_epochs * self.steps_per_epoch
        objective = objective_of(self.config, lambda: self.train_source.all_targets)
        self.teacher = open_teacher(self.config, self.train_source.class_names, self.mesh)
        self.program = Program(self.config, self.mesh, self.steps_per_epoch, objective, self.teacher)
        self._feed = {
            "image_size": self.config.model.image_size,
            "channels": self.config.model.in_channels,
            "batch_size": config.batch_size,
            "rows": rows_of_process(config.batch_size, self.mesh),
        }

    def evaluates_after(self, step: int) -> bool:
        """True if the evaluated images are looked at after so many steps."""
        return step % self.steps_between_evaluations == 0 or step == self.total_steps

    def stops_early(self, step: int, checkpoints: Checkpoints) -> bool:
        """True if this step is evaluated, and too many evaluations in a row have been worse than the best."""
        patience, best = self.config.early_stop.patience, checkpoints.best_evaluated
        if patience is None or best is None or not checkpoints.scores(step):
            return False
        return -(-(step - best) // self.steps_between_evaluations) >= patience

    def saved_state(self, checkpoints: Checkpoints) -> TrainState | None:
        """The newest sound state, on all devices; None before the first checkpoint."""
        abstract = self.program.abstract_state
        if saved := checkpoints.restore_latest(saved_trees(abstract)):
            step, trees = saved
            return TrainState(step=jax.device_put(np.int32(step), abstract.step.sharding), **trees)
        return None

    def initial_state(self) -> TrainState:
        """The state before the first step, on all devices."""
        # Made op by op and then placed: to compile the whole initialisation takes longer than the first step.
        if self.config.init_from:
            wanted, data = self.config.model, self.config.data.source
            names = self.train_source.class_names
            outputs = self.program.objective.outputs
            parameters = open_for(self.config.init_from, wanted, names, data, outputs=outputs, seed=self.config.seed)
            model = model_from_parameters(wanted, parameters)
        else:
            model = build_model(self.config.model, self.config.seed)
        params = nnx.to_pure_dict(nnx.state(model))
        return self.program.init(jax.tree.map(np.asarray, params))

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step on all devices. The memory of `state` is used again: it cannot be read afterwards."""
        taught = {"teacher": self.teacher.params} if self.teacher else {}
        return self.program.train_step(state, to_devices(batch, self.mesh) | taught)

    def batches(self, start: int) -> Iterator[Batch]:
        """Training batches after `start` steps."""
        drawn = {"seed": self.config.seed, "start_step": start, "dtype": self._dtypes[0]}
        return train_batches(self.train_source, self.config.data, **self._feed, **drawn)

    def evaluate(self, state: TrainState, stop: Callable[[], bool]) -> dict[str, float | None] | None:
        """Scores on every evaluated image, each prepared once.

        Args:
            stop: asked after each batch.

        Returns:
            count (images seen), and the metrics of the task for the averaged weights (`ema_`) and the raw ones
            (`raw_`); None if it was stopped.
        """
        found, objective = [], self.program.objective
        weights = {"ema": state.ema, "raw": state.params}
        batches = eval_batches(self.test_source, self.config.data, **self._feed, dtype=self._dtypes[1])
        with contextlib.closing(batches):
            for batch in batches:
                found.append(self.program.eval_step(weights, to_devices(batch, self.mesh)))
                if stop():
                    return None
        found, scores = jax.device_get(found), {}
        for name in weights:
            of_name = objective.task.scores((batch[name] for batch in found), objective.outputs)
            scores["count"] = of_name.pop("count")
            scores |= {f"{name}_{metric}": value for metric, value in of_name.items()}
        return scores

    def content(self) -> dict[str, str]:
        """Digests of what the data of both splits holds, by what they are of."""
        sources = {"training": self.train_source, "evaluated": self.test_source}
        taught = {"parameters of the teacher": self.teacher.digest()} if self.teacher else {}
        return taught | {
            f"{what} of the {split} images": digest
            for split, source in sources.items()
            for what, digest in content_of(source).items()
        }

    def state_bytes(self) -> int:
        """The bytes of a checkpoint on the disk, uncompressed."""
        leaves = jax.tree.leaves(saved_trees(self.program.abstract_state))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def longer_schedule(self, epochs_before: int, step: int) -> str:
        """The effect of raising the epochs, in words."""
        optimizer, per_epoch = self.config.optimizer, self.steps_per_epoch
        rates = [
            float(learning_rate_schedule(optimizer, steps_per_epoch=per_epoch, epochs=epochs)(step))
            for epochs in (epochs_before, self.config.epochs)
        ]
        return (
            f"epochs were raised from {epochs_before} to {self.config.epochs}: the cosine of the learning rate now "
            f"ends later, and the next step has {rates[1]:.3g} instead of {rates[0]:.3g}"
        )

    def describe(self, start: int) -> str:
        """The run in a sentence or two, for people."""
        model = self.config.model
        parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(model)))
        device, evaluated = jax.devices()[0], self.test_source
        verb = "Going on with" if start else "Training"
        outputs = TASKS[self.config.data.task].noun
        return (
            f"{verb} {model.name}: {model.depth} blocks, words {model.inner_dim} and sentences {model.outer_dim} wide, "
            f"{parameters:,} parameters, on {jax.device_count()} {device.device_kind} device(s), "
            f"from step {start} to {self.total_steps}. {len(self.train_source):,} training and "
            f"{len(evaluated):,} {evaluated.name} images of {len(self.train_source.class_names)} {outputs}. "
            f"Everything of the run lies in {self.config.run_dir}{self._notes()}"
        )

    def _notes(self) -> str:
        """Notes where the run may not be what was meant."""
        epochs, optimizer, data = self.config.epochs, self.config.optimizer, self.config.data
        moving = {f"data.{name}": getattr(data, name) for name in ("random_flip", "cutmix", "crop_area")}
        notes = TASKS[data.task].notes(self.train_source.class_names, moving)
        if optimizer.warmup_epochs >= epochs:
            notes.append(
                f"the warm-up of {optimizer.warmup_epochs:g} epochs is not over when the run ends after {epochs}: its "
                f"learning rate never reaches {optimizer.learning_rate:g}; see --optimizer.warmup-epochs"
            )
        return "".join(f"\nnote: {note}" for note in notes)
