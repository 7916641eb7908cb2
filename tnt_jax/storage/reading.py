"""Reading of the checkpoints of a run, with verification.

A run's folder has in `checkpoints/`: a folder for each step that is kept, as Orbax writes it, and beside it the
checksums of its files in `STEP.files.json`; the scores of the steps in `scores.json`; what was found damaged, as
`damaged-STEP`.

Reading ends in one of four ways, and changes nothing: what was saved; DamagedError, where what is on the disk is
proven to be something else; VersionError, where another version of this package wrote it in a form that this one does
not know; UnreadableError, where it cannot be read at the moment. A checkpoint of another model, or of another
optimizer, is a LayoutError.
"""

import contextlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator

import orbax.checkpoint as ocp

from tnt_jax.config import InputError
from tnt_jax.storage.files import first_line, write_text
from tnt_jax.storage.packing import Layout, checksums, layout, packed_shapes, unpack
from tnt_jax.storage.places import COMMITTED, BucketPath, is_bucket, place
from tnt_jax.tasks.table import metric_of

CHECKPOINTS = "checkpoints"
SCORES_FILE = "scores.json"
LAST_CHECKPOINT = "last_checkpoint.json"
FORMAT = 1
FIELDS = {"layouts", "checksums", "least_alone", "crc32"}
"""The values that are saved beside the arrays of a step. `format` came later, and is there where it is not 1."""
FIRST_FIELDS = {"layouts", "checksums", "scores"}
"""The same in the first versions."""

Trees = dict[str, dict]
"""Trees of arrays, or of their shapes and shardings, by name."""


class DamagedError(InputError):
    """The files on the disk are not what was saved."""


class LayoutError(InputError):
    """A checkpoint holds other arrays than are wanted."""


class VersionError(InputError):
    """A checkpoint was written by another version of this package."""


class UnreadableError(RuntimeError):
    """A checkpoint cannot be read now, and nothing says that it is damaged: another try may succeed."""

    exit_code = 75


@contextlib.contextmanager
def readable(place: str | os.PathLike) -> Iterator[None]:
    """Raises UnreadableError where the system cannot say now what lies in a place. That nothing lies there is known."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UnreadableError(f"{place} cannot be read now ({error}). Nothing was touched; try again") from error


def steps_of(run_dir: str | os.PathLike) -> list[int]:
    """The steps whose checkpoints were written to their end, ascending."""
    folder = place(run_dir) / CHECKPOINTS
    with readable(folder):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else ()
        steps = sorted(int(name) for name in names if name.isascii() and name.isdecimal())
        return [step for step in steps if (folder / str(step) / COMMITTED).exists()] if is_bucket(folder) else steps


def scores_of(run_dir: str | os.PathLike) -> dict[int, dict[str, float]]:
    """The scores of the steps that were evaluated; none where the file is missing or damaged."""
    try:
        with readable(run_dir):
            found = json.loads((place(run_dir) / CHECKPOINTS / SCORES_FILE).read_text())
        return {int(step): scores for step, scores in found.items() if isinstance(scores, dict)}
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError, TypeError):
        return {}


def best_of(steps: list[int], scores: dict[int, dict[str, float]], metric: str) -> int | None:
    """The step whose averaged weights are best by a metric, the later one of equals; None where none has it."""
    sign, name = -1 if metric_of(metric).lower_is_better else 1, f"ema_{metric}"
    scored = (step for step in steps if scores.get(step, {}).get(name) is not None)
    return max(scored, key=lambda step: (sign * scores[step][name], step), default=None)


def had_checkpoint(run_dir: str | os.PathLike) -> bool:
    """True if a run has ever had a checkpoint, whatever has become of it."""
    run_dir = place(run_dir)
    folder = run_dir / CHECKPOINTS
    with readable(folder):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        left = [name for name in names if "tmp" not in name and not name.startswith(".")]
        return bool(left) or (run_dir / LAST_CHECKPOINT).exists()


def restore(run_dir: str | os.PathLike, step: int, like: Trees, is_open: Callable[[], None] = lambda: None) -> Trees:
    """Some of the trees of a step, with the shapes and shardings of `like`, verified. The others are not read.

    Args:
        is_open: called when the step is open and has the arrays, before any of them is read, which several processes
            have to do together.

    Raises:
        InputError: there is no checkpoint of this step.
        DamagedError, LayoutError, UnreadableError: as this module says.
    """
    folder = place(run_dir).resolve() / CHECKPOINTS / str(step)
    if not folder.is_dir():
        raise InputError(f"the run in {run_dir} has no checkpoint of step {step}; {steps_in_words(run_dir)}")
    try:
        saved = _description(folder)
        for name, tree in like.items():
            if differ := _differences(saved["layouts"].get(name, []), layout(tree), saved["least_alone"]):
                raise LayoutError(f"{step_name(folder)} has another layout: in {name}, {differ}. Nothing was touched")
        least = saved["least_alone"]
        shapes = {name: packed_shapes(tree, least) for name, tree in like.items()}
        args = ocp.args.PyTreeRestore(
            shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes), partial_restore=True
        )
        is_open()
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            packed = checkpointer.restore(os.fspath(folder / "default"), args=args)
        for name in like:
            sums, finite = checksums(packed[name])
            if sums != saved["checksums"].get(name):
                raise ValueError(f"wrong checksum in {name}")
            if not finite:
                raise DamagedError(f"{step_name(folder)} is damaged: {name} has numbers that are not finite")
    except (InputError, UnreadableError):
        raise
    except Exception as error:  # Orbax and TensorStore raise many types
        raise _explained(folder, error) from error
    return {name: unpack(packed[name], tree, least) for name, tree in like.items()}


def steps_in_words(run_dir: str | os.PathLike) -> str:
    """The steps that a run has, in words."""
    steps = steps_of(run_dir)
    return f"it has {', '.join(map(str, steps))}" if steps else "it has none yet"


def step_name(folder: pathlib.Path | BucketPath) -> str:
    return f"the checkpoint of step {folder.name} in {folder.parent.parent}"


def _description(folder: pathlib.Path | BucketPath) -> dict:
    """The values that were saved beside the arrays of a step. Raises ValueError if they are damaged."""
    # Orbax's own reader hides why it could not read the file.
    description = json.loads((folder / "_CHECKPOINT_METADATA").read_text()).get("custom_metadata")
    fields = set(description) if isinstance(description, dict) else set()
    if fields == FIRST_FIELDS:
        return {**description, "least_alone": 2**16}
    if not fields >= FIELDS or description.get("format", FORMAT) != FORMAT:
        if wrong := _wrong_files(folder):
            raise ValueError(f"{wrong[0]} is not as it was written")
        raise VersionError(f"{step_name(folder)} was written by another version of tnt_jax. Nothing was touched")
    if description.pop("crc32") != description_crc(description):
        raise ValueError("wrong checksum in its description")
    return description


def description_crc(description: dict) -> int:
    return zlib.crc32(json.dumps(description, sort_keys=True).encode())


def _differences(saved: Layout | int, wanted: Layout, least_alone: int) -> str | None:
    """The difference of two layouts, in words; None where they are equal."""
    if saved == wanted:
        return None
    if isinstance(saved, int):  # the first versions kept a checksum
        leaves = [(path, tuple(shape), dtype) for path, shape, dtype in wanted]
        return None if saved == zlib.crc32(str((least_alone, leaves)).encode()) else "other arrays"
    there, here = ({path: f"{dtype} {tuple(shape)}" for path, shape, dtype in each} for each in (saved, wanted))
    differ = [
        f"{path} is {there.get(path, 'missing')} there and {here.get(path, 'missing')} here"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path)
    ]
    more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
    return "; ".join(differ[:3]) + more if differ else "the arrays come in another order"


# What TensorStore says where the disk, the network or memory is to blame.
NOT_NOW = re.compile(
    "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED|OS error|[Oo]ut of memory"
)


def _explained(folder: pathlib.Path, error: Exception) -> DamagedError | UnreadableError:
    """The outcome that an error in reading a step means: damage only where the files prove it."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    unreadable = UnreadableError(f"{step_name(folder)} cannot be read now ({reason}). Nothing was touched; try again")
    causes = list(chain_of(error))
    if any(isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) for cause in causes):
        return unreadable
    if any(isinstance(cause, MemoryError) or NOT_NOW.search(str(cause)) for cause in causes):
        return unreadable
    try:
        wrong = _wrong_files(folder)
    except OSError as other:
        return UnreadableError(f"{step_name(folder)} cannot be read now ({other}). Nothing was touched; try again")
    if wrong is None:  # killed before they were noted
        return DamagedError(f"{step_name(folder)} is damaged ({reason})")
    return DamagedError(f"{step_name(folder)} is damaged ({wrong[0]}: {reason})") if wrong else unreadable


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def files_file(folder: pathlib.Path | BucketPath) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.files.json")


def note_files(folder: pathlib.Path | BucketPath) -> None:
    """Writes down the checksum of each file of a step."""
    if is_bucket(folder):
        files = folder.checksums()
    else:
        files = {str(path.relative_to(folder)): _crc_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_text(files_file(folder), json.dumps(files, indent=1))


def _wrong_files(folder: pathlib.Path | BucketPath) -> list[str] | None:
    """The files of a step that are not as they were written; None where that was not noted."""
    try:
        files = json.loads(files_file(folder).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if is_bucket(folder):
        there = folder.checksums()
        return [name for name, checksum in files.items() if there.get(name) != checksum]

    def is_right(path: pathlib.Path, crc: int) -> bool:
        try:
            return _crc_of(path) == crc
        except FileNotFoundError:
            return False

    return [name for name, crc in files.items() if not is_right(folder / name, crc)]


def _crc_of(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc
