"""What lies in a run's folder: its configuration, and checkpoints that are written while training goes on."""

import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from tnt_jax.config import InputError, TrainConfig, from_json, to_json
from tnt_jax.storage.folder import ModelDescription, Preprocessing, describe, write_description
from tnt_jax.storage.packing import checksums, layout, pack, packed_shapes, unpack

CONFIG_FILE = "config.json"
BEST_METRIC = "ema_top1"


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
        there = flat(to_json(read_config(config.run_dir)))
        wanted = flat(to_json(config))
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


def flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Checkpoints:
    """The checkpoints of a run.

    The latest few and the best one, each with parameters, their average and the optimizer.

    Args:
        keep: how many of the latest.
        warn: is told of each checkpoint that is damaged, which is then put aside as `damaged-STEP`.

    Raises:
        InputError: a checkpoint is damaged, and there is no `warn`.
    """

    def __init__(self, run_dir: str | os.PathLike, *, keep: int = 1, warn: Callable[[str], None] | None = None):
        policies = checkpoint_managers.preservation_policy
        _quiet_orbax()
        self._folder = pathlib.Path(run_dir).resolve() / "checkpoints"
        self._warn = warn
        self._failed = False
        for step in self._written():  # the manager does not start beside one that it cannot read
            self._read_or_put_aside(step, self._description)
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
        )

    @property
    def steps(self) -> list[int]:
        """The steps that are kept."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest step that was written to its end, None before the first."""
        return max(self._written(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the highest test accuracy of the averaged weights, None where nothing was evaluated."""
        return self._manager.best_step()

    def _written(self) -> list[int]:
        # As they lie on the disk: the manager counts what it has only begun to write.
        names = os.listdir(self._folder) if self._folder.is_dir() else ()
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def save(self, step: int, trees: dict[str, dict], scores: dict[str, float] | None) -> None:
        """Begins to write a checkpoint of some trees by name; `scores` are those of this step, if it was evaluated.

        Raises:
            WriteError: it cannot be written, or one before it could not.
        """
        packed = {name: pack(tree) for name, tree in trees.items()}
        description = {
            "layouts": {name: layout(tree) for name, tree in trees.items()},
            "checksums": {name: checksums(arrays) for name, arrays in packed.items()},
            "scores": scores,
        }
        with self._writing():
            self._manager.check_for_errors()
            self._manager.save(step, args=ocp.args.PyTreeSave(packed), metrics=scores, custom_metadata=description)

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

    def restore_latest(self, like: dict[str, dict]) -> tuple[int, dict[str, dict]] | None:
        """The newest sound step and its trees, with the shapes and shardings of `like`; None where there is none."""
        for step in reversed(self.steps):
            if trees := self._read_or_put_aside(step, lambda step: self.restore(step, like)):
                return step, trees
            self._manager.reload()
        return None

    def restore(self, step: int, like: dict[str, dict]) -> dict[str, dict]:
        """Some of params, ema and opt_state of a step, with the shapes and shardings of `like`, verified.

        The others are not read.

        Raises:
            InputError: it cannot be read, or is not what was saved.
        """
        saved = self._description(step)
        for name, tree in like.items():
            if saved["layouts"].get(name) != layout(tree):
                raise InputError(f"{self._name(step)} is damaged ({name} is of another model)")
        shapes = {name: packed_shapes(tree) for name, tree in like.items()}
        args = ocp.args.PyTreeRestore(
            shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes), partial_restore=True
        )
        with self._reading(step, ", ".join(like)):
            packed = self._manager.restore(step, args=args)
        for name in like:
            if checksums(packed[name]) != saved["checksums"].get(name):
                raise InputError(f"{self._name(step)} is damaged (wrong checksum in {name})")
        return {name: unpack(packed[name], tree) for name, tree in like.items()}

    def _description(self, step: int) -> dict:
        """What was saved beside the arrays of a step. Raises InputError if it cannot be read, or contradicts itself."""
        folder = self._folder / str(step)
        with self._reading(step, "its description"), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            description = checkpointer.metadata(folder).custom_metadata
            scores = folder / "metrics" / "metrics"
            there = json.loads(scores.read_text()) if scores.exists() else None
            if repr(there) != repr(description["scores"]):  # in which NaN is NaN
                raise ValueError
            return {name: description[name] for name in ("layouts", "checksums")}

    @contextlib.contextmanager
    def _reading(self, step: int, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise InputError(f"{self._name(step)} is damaged ({type(error).__name__} in {what})") from error

    def _name(self, step: int) -> str:
        return f"the checkpoint of step {step} in {self._folder.parent}"

    def _read_or_put_aside(self, step: int, read: Callable[[int], dict]) -> dict | None:
        """What is read of a step; None if that could not be done in all processes, and the step was put aside."""
        if self._warn is None:
            return read(step)
        result, damage = None, f"{self._name(step)} is damaged for another process"
        try:
            result = read(step)
        except InputError as error:
            damage = error
        if _everywhere(result is not None):
            return result
        older = max((other for other in self._written() if other < step), default=None)
        back = "the beginning" if older is None else f"step {older}"
        self._warn(f"{damage}. " + (f"Going back to {back}" if step == self.latest_step else "It is put aside"))
        _everywhere(True)  # has looked
        if jax.process_index() == 0:
            aside = self._folder / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)
        _everywhere(True)  # may look again
        return None

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


@functools.cache
def _quiet_orbax() -> None:
    """Keeps Orbax from printing pages, in threads and of what it left half read, on what becomes one message here."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    others = sys.unraisablehook

    def hook(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        left = (code and "orbax" in code.co_filename) or str(unraisable.exc_value) == "Event loop is closed"
        if not left:
            others(unraisable)

    sys.unraisablehook = hook


def _everywhere(sound: bool) -> bool:
    """Whether it is true in all processes, which wait here for each other."""
    return sound if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(sound)).all())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _score(scores: dict[str, float]) -> float:
    return scores[BEST_METRIC]
