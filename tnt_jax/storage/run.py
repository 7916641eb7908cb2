"""A run's folder: the run's identity, the comparison of another start with it, and its model, also while it trains.

`config.json` is written last and in one step: a folder without it holds no run. Beside it lie `model.json`, `data.json`
(digests of what the data holds) and `starts.jsonl` (a line for each start, with the fields that changed).
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from tnt_jax.config import InputError, TrainConfig, best_metric
from tnt_jax.fields import role_of
from tnt_jax.models.variants import Model, abstract_model
from tnt_jax.storage.description import (
    DESCRIPTION,
    ModelDescription,
    Outputs,
    Preprocessing,
    describe,
    from_json,
    read_description,
    to_json,
    write_description,
)
from tnt_jax.storage.files import UNFINISHED, append, free_space, write_text
from tnt_jax.storage.lock import HOLDER_FILE, LOCK_FILE, RunningError
from tnt_jax.storage.places import BucketPath, is_bucket, place
from tnt_jax.storage.reading import (
    DamagedError,
    UnreadableError,
    best_of,
    readable,
    restore,
    scores_of,
    steps_in_words,
    steps_of,
)
from tnt_jax.tasks.table import TASKS

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
STARTS_FILE = "starts.jsonl"
LOCK_FILES = (LOCK_FILE, HOLDER_FILE)
RUN_FILES = ("checkpoints", "metrics.jsonl", STARTS_FILE, "tensorboard")  # of which a run has some, a model none
TREES = {"ema": "ema", "raw": "params"}
ATTEMPTS = 3


def read_config(run_dir: str | os.PathLike) -> TrainConfig:
    """The configuration of the run in this folder.

    Raises:
        InputError: the folder holds no run.
    """
    path = place(run_dir) / CONFIG_FILE
    try:
        with readable(path):
            text = path.read_text()
        return from_json(json.loads(text))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{run_dir} is not the folder of a run: it has no {CONFIG_FILE}") from None
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as the configuration of a run: {error}") from error


def is_run(folder: str | os.PathLike) -> bool:
    """True if a training run, or something of one, lies in a folder. A hub repository has a `config.json` as well."""
    folder = place(folder)
    if any((folder / name).exists() for name in RUN_FILES):
        return True
    return (folder / CONFIG_FILE).is_file() and not is_hub_folder(folder)


def is_hub_folder(folder: str | os.PathLike) -> bool:
    """True if a folder is a repository as timm's hub has it: its `config.json` names an architecture."""
    try:
        fields = json.loads((place(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "architecture" in fields


def compare(config: TrainConfig, content: Mapping[str, str]) -> dict[str, list] | None:
    """The changes since the run in `config.run_dir` was started last; None where no run is there.

    Nothing is written.

    Args:
        content: digests of what the data holds, by what they are of.

    Returns:
        The fields of how the run is computed, watched and kept that changed, and `epochs` if it was raised, each with
        its values before and now.

    Raises:
        InputError: something else lies there, or a run of another identity; or it cannot be written.
        UnreadableError: it cannot be read now.
    """
    folder = place(config.run_dir)
    with _writable(folder):
        if not folder.exists() or _is_unclaimed(folder):
            return None
    there, wanted = by_role(read_config(folder)), by_role(config)
    changed = {
        name: [there.get(name, (None,))[0], value]
        for name, (value, _) in wanted.items()
        if there.get(name, (None,))[0] != value
    }
    another = [
        f"{name} {before!r} (now {now!r})"
        for name, (before, now) in changed.items()
        if wanted[name][1] == "identity" and not (name == "epochs" and now > before)
    ]
    if another:
        raise InputError(
            f"{folder} holds a run of another configuration: {', '.join(another)}. "
            "Go on with the same one, or choose another folder with --run-dir"
        )
    if differ := [name for name, digest in _content(folder).items() if content.get(name, digest) != digest]:
        before, _ = changed.get("data.eval_split", (None, None))
        evaluated = f" It evaluates the split {before!r}: --data.eval-split {before}." if before else ""
        raise InputError(
            f"{folder} holds a run on other data: {', '.join(differ)} differ.{evaluated} {config.data.source} must "
            "hold what the run began with, or choose another folder with --run-dir"
        )
    for each in () if is_bucket(folder) else (folder, folder / "checkpoints"):
        if each.exists() and not os.access(each, os.W_OK):
            raise InputError(f"the run's folder {each} cannot be written: go on in a copy of it, with --run-dir")
    return changed


def _is_unclaimed(folder: pathlib.Path | BucketPath) -> bool:
    """True if a folder is empty, or holds what a start left that ended before it had claimed the folder."""
    left = {DESCRIPTION, DATA_FILE, STARTS_FILE, *LOCK_FILES}
    empty = (folder / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).stat().st_size
    left |= {CONFIG_FILE} if empty else set()
    return all(path.name in left or UNFINISHED in path.name for path in folder.iterdir())


def by_role(config, prefix: str = "") -> dict[str, tuple]:
    """Value and role of each field that `config.json` holds, by its dotted name, but for the folder's own name."""
    kept, found = None if prefix else to_json(config), {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if name == "run_dir" or (kept is not None and field.name not in kept):
            continue
        found |= by_role(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: (value, role_of(field))}
    return found


def _content(folder: pathlib.Path | BucketPath) -> dict[str, str]:
    try:
        with readable(folder):
            found = json.loads((folder / DATA_FILE).read_text())
            # As earlier versions called what was evaluated, whatever it was.
            return {name.replace("of the test images", "of the evaluated images"): found[name] for name in found}
    except (FileNotFoundError, ValueError):
        return {}


def claim(
    config: TrainConfig,
    class_names: Sequence[str],
    outputs: Outputs,
    content: Mapping[str, str],
    changed: dict | None,
    start: Mapping,
) -> None:
    """Writes into `config.run_dir` what the run is now, and that it is started; `changed` is what `compare` found.

    Args:
        outputs: what those of the model mean.
        start: what else is noted of this start.

    Raises:
        InputError: it cannot be written.
        UnreadableError: it cannot be written now.
        RunningError: another start has claimed the folder since.
    """
    folder = place(config.run_dir)
    if compare(config, content) != changed:  # between the two nobody held the lock
        raise RunningError(f"{folder} was claimed by another start of the run meanwhile; start this one again")
    with _writable(folder):
        if changed is None:
            write_description(folder, _description(config, class_names, outputs))
        if not (folder / DATA_FILE).exists():
            write_text(folder / DATA_FILE, json.dumps(dict(content), indent=1) + "\n")
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **start, "changed": changed or {}}
        append(folder / STARTS_FILE, json.dumps(line, default=str) + "\n")
        if changed is None or changed:
            write_text(folder / CONFIG_FILE, json.dumps(to_json(config), indent=2) + "\n")


@contextlib.contextmanager
def _writable(folder: pathlib.Path | BucketPath) -> Iterator[None]:
    """Raises InputError where a run's folder cannot be written, UnreadableError where another try may succeed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR):
            raise UnreadableError(f"{folder} cannot be used now ({error}). Nothing is lost; start again") from error
        raise InputError(f"cannot write into the run's folder {folder}: {error.strerror or error}") from error


def _description(config: TrainConfig, class_names: Sequence[str], outputs: Outputs) -> ModelDescription:
    model, data = config.model, config.data
    mean, std = (np.broadcast_to(value, model.in_channels).tolist() for value in (data.mean, data.std))
    return describe(
        model,
        class_names=class_names,
        source={"run": config.run_dir, "data": data.source},
        preprocessing=Preprocessing(model.image_size, data.crop, tuple(mean), tuple(std), white=data.white),
        outputs=outputs,
    )


def check_checkpoint_space(config: TrainConfig, state_bytes: int) -> None:
    """Raises InputError unless the disk has room for the checkpoints that a run will keep.

    These are the latest, the best, and the one that is being written.
    """
    if is_bucket(config.run_dir):
        return
    missing = max(config.keep_checkpoints + 2 - len(steps_of(config.run_dir)), 1)
    free, needed = free_space(config.run_dir), missing * state_bytes
    if free < needed:
        raise InputError(
            f"the disk of {config.run_dir} has {free / 1e9:.2f} GB free, and the checkpoints to come need "
            f"{needed / 1e9:.2f} GB: {missing} of {state_bytes / 1e9:.2f} GB. Make room, or take another --run-dir"
        )


def load_run(run_dir: str | os.PathLike, *, weights: str = "ema", step: int | None = None) -> Model:
    """The model of a training run; see `tnt_jax.load_model`.

    Raises:
        InputError: the run has no checkpoint yet, or none of this step; or it is damaged.
        UnreadableError: it cannot be read now.
    """
    description = read_description(run_dir)
    graphdef, state = nnx.split(abstract_model(description.config))
    # Onto one device of this machine, wherever it was trained.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    own = nnx.to_pure_dict(state)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), average_like(own))
    step, trees = _restored(run_dir, step, {TREES[weights]: like})
    params = trees[TREES[weights]]
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), params, own))
    origin = {
        **(description.source or {}),
        "run": os.fspath(run_dir) if is_bucket(run_dir) else os.path.abspath(run_dir),
        "step": step,
        "weights": weights,
        "scores": scores_of(run_dir).get(step),
    }
    model.description = dataclasses.replace(description, source=origin)
    return model


def average_like(params: dict) -> dict:
    """Shapes and dtypes of what a run keeps of parameters, and of their average: float32 or more, for bfloat16 cannot
    hold so small changes."""

    def average(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jax.numpy.promote_types(leaf.dtype, "float32"))

    return jax.tree.map(average, params)


def _restored(run_dir: str | os.PathLike, asked: int | None, like: dict) -> tuple[int, dict]:
    for attempt in range(1, ATTEMPTS + 1):
        steps = steps_of(run_dir)
        step = asked if asked is not None else _best(run_dir, steps) or max(steps, default=None)
        if step is None:
            raise InputError(f"the run in {run_dir} has no checkpoint yet")
        try:
            return step, restore(run_dir, step, like)
        except InputError as error:
            # A run that is being trained removes its old steps.
            gone = step not in steps_of(run_dir)
            if asked is None and gone and attempt < ATTEMPTS:
                continue
            if gone or not isinstance(error, DamagedError):
                raise
            others = [each for each in steps if each != step]
            raise DamagedError(f"{error}; of the run, {steps_in_words(run_dir)}" if others else str(error)) from error
    raise AssertionError


def _best(run_dir: str | os.PathLike, steps: list[int]) -> int | None:
    """The best of some steps by the metric that the run's configuration says, or that of its task."""
    try:
        metric = best_metric(read_config(run_dir))
    except InputError:  # it is not there, or of another version
        metric = TASKS[read_description(run_dir).outputs.task].metrics[0].name
    return best_of(steps, scores_of(run_dir), metric)
