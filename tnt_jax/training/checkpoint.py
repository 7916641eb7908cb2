"""What lies in a run's folder: its configuration, and checkpoints that are written while training goes on."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from tnt_jax.config import InputError, TrainConfig, from_json, to_json
from tnt_jax.models.saving import ModelDescription, Preprocessing, describe, read_description, write_description
from tnt_jax.models.variants import Model, abstract_model
from tnt_jax.training.step import TrainState

CONFIG_FILE = "config.json"
BEST_METRIC = "ema_top1"
ITEMS = ("params", "ema", "opt_state")


class WriteError(RuntimeError):
    """The run's folder cannot be written any more. What was written to its end is still there."""

    exit_code = 1


def read_config(run_dir: str | os.PathLike) -> TrainConfig:
    """The configuration of the run in this folder.

    Raises:
        InputError: the folder holds no run.
    """
    path = pathlib.Path(run_dir) / CONFIG_FILE
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise InputError(f"{run_dir} is not the folder of a run: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as the configuration of a run: {error}") from error


def is_run(path: str | os.PathLike) -> bool:
    """Whether a training run lies in this folder."""
    return (pathlib.Path(path) / CONFIG_FILE).is_file()


def claim_run_dir(config: TrainConfig, class_names: Sequence[str]) -> None:
    """Writes what the run is into its folder, or makes sure that the run that lies there has the same configuration.

    Of several processes the first does it.

    Raises:
        InputError: the folder cannot be written, holds something else, or holds a run of another configuration; or not
            all processes see the same folder.
    """
    if jax.process_index() == 0:
        _claim(config, class_names)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")
        if not is_run(config.run_dir):
            raise InputError(
                f"{config.run_dir} of process 0 is not there on process {jax.process_index()}: a run must "
                "lie on a disk that all processes share"
            )


def _claim(config: TrainConfig, class_names: Sequence[str]) -> None:
    folder = pathlib.Path(config.run_dir)
    if folder.is_dir() and any(folder.iterdir()):
        there = _flat(to_json(read_config(config.run_dir)))
        wanted = _flat(to_json(config))
        changed = [f"{name} {there[name]!r} (now {wanted[name]!r})" for name in wanted if there[name] != wanted[name]]
        # The folder may have been moved or named in another way.
        changed = [change for change in changed if not change.startswith("run_dir ")]
        if changed:
            raise InputError(
                f"{folder} holds a run of another configuration: {', '.join(changed)}. "
                "Go on with the same one, or choose another folder with --run-dir"
            )
        for place in (folder, folder / "checkpoints"):
            if place.exists() and not os.access(place, os.W_OK):
                raise InputError(f"the run's folder {place} cannot be written: go on in a copy of it, with --run-dir")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_description(folder, _description(config, class_names))
        (folder / CONFIG_FILE).write_text(json.dumps(to_json(config), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write into the run's folder {folder}: {error.strerror}") from error


def _description(config: TrainConfig, class_names: Sequence[str]) -> ModelDescription:
    model, data = config.model, config.data
    mean, std = ((value,) * model.in_channels for value in (data.mean, data.std))
    return describe(
        model,
        class_names=class_names,
        source={"run": config.run_dir, "data": data.source},
        preprocessing=Preprocessing(model.image_size, data.crop, mean, std),
    )


def load_run(run_dir: str | os.PathLike, *, weights: str = "ema", step: int | None = None) -> Model:
    """The model of a training run; see `tnt_jax.load_model`.

    Raises:
        InputError: the run has no checkpoint yet, or none of this step.
    """
    description = read_description(run_dir)
    graphdef, state = nnx.split(abstract_model(description.config))
    # Onto one device of this machine, wherever it was trained.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), nnx.to_pure_dict(state)
    )
    with contextlib.closing(Checkpoints(run_dir)) as checkpoints:
        step = checkpoints.best_step or checkpoints.latest_step if step is None else step
        if step not in checkpoints.steps:
            kept = f"it has {checkpoints.steps}" if checkpoints.steps else "it has none yet"
            raise InputError(f"the run in {run_dir} has no checkpoint of step {step}; {kept}")
        item = {"ema": "ema", "raw": "params"}[weights]
        params = checkpoints.restore_item(step, item, like)
    model = nnx.merge(graphdef, params)
    model.description = description
    return model


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Checkpoints:
    """The checkpoints of a run.

    The latest few and the best one, each with parameters, their average and the optimizer.
    """

    def __init__(self, run_dir: str, *, keep: int = 1):
        policies = checkpoint_managers.preservation_policy
        # Every thread of Orbax logs pages of what it then raises, which becomes one message here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._folder = pathlib.Path(run_dir).resolve() / "checkpoints"
        self._failed = False
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                # best_fn makes best_step() the best; alone, it would also throw the newest away.
                best_fn=_score,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                enable_async_checkpointing=True,
            ),
            item_names=(*ITEMS, "checksums"),
        )

    @property
    def steps(self) -> list[int]:
        """The steps that are kept."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest step that was written to its end, None before the first."""
        # As they lie on the disk: the manager counts what it has only begun to write.
        return max((int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()), default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the highest test accuracy of the averaged weights, None where nothing was evaluated."""
        return self._manager.best_step()

    def save(self, step: int, state: TrainState, scores: dict[str, float] | None) -> None:
        """Begins to write a checkpoint; `scores` are those of this step, if it was evaluated.

        Raises:
            WriteError: it cannot be written, or one before it could not.
        """
        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in ITEMS}
        sums = {name: checksums(getattr(state, name)) for name in ITEMS}
        args = ocp.args.Composite(**items, checksums=ocp.args.JsonSave(sums))
        with self._writing():
            self._manager.check_for_errors()
            self._manager.save(step, args=args, metrics=scores)

    def check(self) -> None:
        """Raises WriteError if a checkpoint that is being written has failed."""
        with self._writing():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types where a disk is full or broken
            self._failed = True
            raise WriteError(f"a checkpoint cannot be written into {self._folder}: {_first_line(error)}") from error

    def restore_latest(self, like: TrainState, *, warn: Callable[[str], None]) -> TrainState | None:
        """The newest state that is sound, with the shapes and shardings of `like`; None where there is none.

        A damaged checkpoint is reported to `warn` and put aside as `damaged-STEP`.
        """
        for step in reversed(self.steps):
            items, damage = None, None
            try:
                items = {name: self.restore_item(step, name, getattr(like, name)) for name in ITEMS}
            except InputError as error:
                damage = error
            if not _everywhere(items is not None):
                fallback = max((other for other in self.steps if other < step), default=None)
                what = damage or f"the checkpoint of step {step} is damaged for another process"
                warn(f"{what}. Going back to {'the beginning' if fallback is None else f'step {fallback}'}")
                if jax.process_index() == 0:
                    (self._folder / str(step)).rename(self._folder / f"damaged-{step}")
                _everywhere(True)  # waits for the first process
                self._manager.reload()
            else:
                return TrainState(step=jax.device_put(np.int32(step), like.step.sharding), **items)
        return None

    def restore_item(self, step: int, item: str, like: dict) -> dict:
        """One of params, ema and opt_state of a step, with the shapes and shardings of `like`, verified.

        Raises:
            InputError: it cannot be read, or is not what was saved.
        """
        what = f"the checkpoint of step {step} in {self._folder.parent}"
        args = {item: ocp.args.StandardRestore(like), "checksums": ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise InputError(f"{what} is damaged ({type(error).__name__} in {item})") from error
        saved, found = restored["checksums"][item], checksums(restored[item])
        if damaged := [name for name in found if found[name] != saved.get(name)]:
            raise InputError(f"{what} is damaged (wrong checksum in {item}: {', '.join(damaged[:3])})")
        return restored[item]

    def scores(self, step: int) -> dict[str, float]:
        """The scores that were saved with a step."""
        return self._manager.metrics(step)

    def wait(self) -> None:
        """Waits until everything is on the disk. Raises WriteError if something could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on the disk. Raises WriteError if something could not be written, once."""
        with contextlib.suppress(WriteError) if self._failed else contextlib.nullcontext():
            self.wait()
            self._manager.close()


def _everywhere(sound: bool) -> bool:
    """Whether it is true in all processes, which wait here for each other."""
    return sound if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(sound)).all())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def checksums(tree) -> dict[str, int]:
    """A 32-bit checksum of every array by its path, computed where the array lies, the same on any number of devices.

    The bits of each element times an odd number of its own, summed modulo 2^32: no change of one element goes unseen.
    """
    sums = jax.device_get(_checksums(tree))
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


@jax.jit
def _checksums(tree):
    def checksum(leaf: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, length in enumerate(leaf.shape):
            place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def _score(scores: dict[str, float]) -> float:
    return scores[BEST_METRIC]
