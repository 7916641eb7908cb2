"""Checkpoints of a run, written while training goes on; `reading` says what lies in its folder."""

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tnt_jax.config import InputError
from tnt_jax.storage.files import first_line, may_merge, write_text
from tnt_jax.storage.packing import LEAST_ALONE, checksums, layout, pack
from tnt_jax.storage.places import COMMITTED, place
from tnt_jax.storage.reading import (
    CHECKPOINTS,
    LAST_CHECKPOINT,
    SCORES_FILE,
    DamagedError,
    LayoutError,
    Trees,
    UnreadableError,
    VersionError,
    best_of,
    chain_of,
    description_crc,
    files_file,
    had_checkpoint,
    note_files,
    readable,
    restore,
    scores_of,
    step_name,
    steps_of,
)

LONGEST_WRITE = 1800
"""Seconds after which a checkpoint counts as one that cannot be written."""
MOST_STEPS = 256
"""So many steps are looked at when a run starts again."""
STAYS = re.compile(
    "No space left|File too large|Read-only file system|Permission denied|Operation not permitted|quota exceeded"
)


class WriteError(RuntimeError):
    """The run's folder cannot be written any more. What was written to its end is still there."""

    @property
    def exit_code(self) -> int:
        """1 where another start would meet the same, which TensorStore tells in words; or else 75: start again."""
        return 1 if any(STAYS.search(str(error)) for error in chain_of(self)) else 75


class NonFiniteError(RuntimeError):
    """A number of a run is infinite or not a number; nothing is saved of that step."""

    exit_code = 1
    agreed = True  # all processes of a run raise it


class Checkpoints:
    """Writes the checkpoints of a run, and finds the newest sound one. Of several processes all must call it alike.

    The latest few and the best one are kept.

    Args:
        keep: how many of the latest.
        best_by: the metric of the averaged weights by which one of them is the best.
        warn: is told of each checkpoint that is damaged, which is then renamed to `damaged-STEP`.

    Raises:
        UnreadableError: the folder cannot be read now.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        keep: int = 1,
        best_by: str = "top1",
        warn: Callable[[str], None] = print,
    ):
        self._best_by = best_by
        self._run_dir = place(run_dir).resolve()
        self._folder = self._run_dir / CHECKPOINTS
        self._warn, self._keep = warn, keep
        self._failed = False
        self._being_written: int | None = None
        self._noting = threading.Thread()
        self._failure: BaseException | None = None
        self._scores = scores_of(run_dir)
        several = jax.process_count() > 1
        with readable(self._folder):
            self._manager = ocp.CheckpointManager(
                os.fspath(self._folder),
                item_handlers=ocp.PyTreeCheckpointHandler(use_ocdbt=may_merge(self._folder)),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self,
                    enable_async_checkpointing=True,
                    # Orbax measures with the machine's clock, which jumps: a laptop wakes up, a server is set right.
                    # Where its threads make the folders, all others wait for five minutes by it for those who failed.
                    async_options=ocp.options.AsyncOptions(
                        4 * 10**9, self._meet if several else None, create_directories_asynchronously=False
                    ),
                    single_host_load_and_broadcast=several,
                ),
            )

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes, but not where Orbax would do so before it raises an error of its thread."""
        if threading.current_thread() is not threading.main_thread() and (error := sys.exc_info()[1]):
            self._failure = error
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax asks which of these steps are kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = {*steps[-self._keep :], best_of(steps, self._scores, self._best_by)}
        return [step in keep for step in steps]

    @property
    def latest_step(self) -> int | None:
        """The newest step that was written to its end, None before the first."""
        return max(steps_of(self._run_dir), default=None)

    def save(self, step: int, trees: Trees) -> None:
        """Begins to write a checkpoint.

        Raises:
            NonFiniteError: a number in it is not finite; nothing is written.
            WriteError: it cannot be written, or one before it could not.
        """
        packed = {name: pack(tree) for name, tree in trees.items()}
        description = {"layouts": {name: layout(tree) for name, tree in trees.items()}, "checksums": {}}
        for name, arrays in packed.items():
            description["checksums"][name], finite = checksums(arrays)
            if not finite:
                raise NonFiniteError(f"{name} has numbers that are not finite after step {step}")
        description["least_alone"] = LEAST_ALONE
        description["crc32"] = description_crc(description)
        if self._scores.pop(step, None):  # of a checkpoint that was damaged, or of steps that were taken again
            self._write_scores()
        with self._writing():
            self.wait()
            self._being_written = step
            try:
                saved = self._manager.save(step, args=ocp.args.PyTreeSave(packed), custom_metadata=description)
            except Exception as error:
                self._failure = error  # for Orbax the step is being written for ever
                raise
            if not saved:
                raise RuntimeError(f"Orbax has left out step {step}")

    def _note_when_written(self) -> None:
        """Notes the checksums of the files of a step, in a thread, when it was written to its end."""
        step = self._being_written
        if step is None or not (self._folder / str(step)).is_dir():
            return
        self._being_written = None
        if jax.process_index() == 0:
            self._noting = threading.Thread(target=self._note, args=(step,))
            self._noting.start()

    def _note(self, step: int) -> None:
        # Without these a checkpoint is still sound.
        with contextlib.suppress(OSError):
            write_text(self._run_dir / LAST_CHECKPOINT, json.dumps({"step": step}) + "\n")
            note_files(self._folder / str(step))
            for path in self._folder.glob("*.files.json"):
                if not (self._folder / path.name.partition(".")[0]).exists():
                    path.unlink()

    def set_scores(self, step: int, scores: dict[str, float]) -> None:
        """Notes the scores of a step that was saved.

        Raises:
            WriteError: they cannot be written.
        """
        self._scores[step] = scores
        self._write_scores()

    def _write_scores(self) -> None:
        if jax.process_index() == 0:
            kept = {*steps_of(self._run_dir), self._being_written, max(self._scores, default=None)}
            noted = {str(each): self._scores[each] for each in sorted(self._scores) if each in kept}
            with self._writing():
                write_text(self._folder / SCORES_FILE, json.dumps(noted, indent=1, allow_nan=False) + "\n")

    def scores(self, step: int) -> dict[str, float] | None:
        """The scores of a step, None where it was not evaluated."""
        return self._scores.get(step)

    @property
    def best_step(self) -> int | None:
        """The step whose averaged weights are best on the evaluated images, None where nothing was evaluated."""
        return best_of(steps_of(self._run_dir), self._scores, self._best_by)

    @property
    def best_evaluated(self) -> int | None:
        """The best of all steps that were evaluated, whether or not it is on the disk by now."""
        return best_of(sorted(self._scores), self._scores, self._best_by)

    def check(self) -> None:
        """Raises WriteError if a checkpoint that is being written has failed."""
        with self._writing():
            self._manager.check_for_errors()
            self._raise_failure()
        self._note_when_written()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types where a disk is full or broken
            self._failed = True
            if isinstance(error, WriteError):
                raise
            raise WriteError(f"a checkpoint cannot be written into {self._folder}: {first_line(error)}") from error

    def restore_latest(self, like: Trees) -> tuple[int, Trees] | None:
        """The newest sound step and its trees, with the shapes and shardings of `like`; None where none was ever saved.

        Steps that are damaged are renamed to `damaged-STEP`.

        Raises:
            InputError: there have been checkpoints, and none is sound.
            LayoutError, VersionError, UnreadableError: as `restore`; nothing was touched.
        """
        steps, had = self._listed()
        for step in reversed(steps):
            if (trees := self._read_or_rename(step, like)) is not None:
                return step, trees
        if had:
            raise _agreed(
                InputError(
                    f"{self._run_dir} has had checkpoints, and none is there that could be gone on from. "
                    "A run does not begin anew by itself: take another --run-dir, or remove this one"
                )
            )
        return None

    def _listed(self) -> tuple[list[int], bool]:
        """The steps that process 0 sees, and whether there has ever been one: disks may show others something else."""
        steps, had = steps_of(self._run_dir)[-MOST_STEPS:], had_checkpoint(self._run_dir)
        if jax.process_count() == 1:
            return steps, had
        row = np.full(MOST_STEPS + 1, -1, np.int32)
        row[: len(steps)], row[-1] = steps, had
        row = multihost_utils.broadcast_one_to_all(row)
        return [int(step) for step in row[:-1] if step >= 0], bool(row[-1])

    def _read_or_rename(self, step: int, like: Trees) -> Trees | None:
        """The trees of a step; None if they are damaged for one of the processes, and the step was renamed."""
        trees, error, worst = None, None, 0
        elsewhere = f"the checkpoint of step {step} in {self._run_dir}: see another process"

        def is_open() -> None:
            nonlocal worst
            if worst := _worst(0):  # a process that cannot open it would be missing where Orbax has all of them meet
                raise UnreadableError(elsewhere)

        try:
            trees = restore(self._run_dir, step, like, is_open)
        except (InputError, UnreadableError) as found:
            # Process 0 has listed it: what is not there is not seen here yet.
            error = UnreadableError(f"{found}. Try again") if type(found) is InputError else found
        worst = worst or _worst(0 if error is None else OUTCOMES.index(type(error)))
        if worst == 0:
            return trees
        if type(error) is not OUTCOMES[worst]:
            error = OUTCOMES[worst](elsewhere)
        if worst > OUTCOMES.index(DamagedError):
            raise _agreed(error)
        self._rename(step, error)
        return None

    def _rename(self, step: int, reason: Exception) -> None:
        older = [other for other in steps_of(self._run_dir) if other < step]
        back = f"Going back to step {older[-1]}" if older else "No older one is left"
        _worst(0)  # every process has looked
        name = f"damaged-{step}"
        while (self._folder / name).exists():
            name += "-again"
        if jax.process_index() == 0:
            (self._folder / str(step) / COMMITTED).unlink(missing_ok=True)  # in a bucket, renaming takes a while
            (self._folder / str(step)).rename(self._folder / name)
            files_file(self._folder / str(step)).unlink(missing_ok=True)
        self._warn(f"{reason}. It is renamed to {name}. {back}")
        _worst(0)  # every process may look again
        if self._scores.pop(step, None):
            self._write_scores()
        with readable(self._folder):
            self._manager.reload()

    def wait(self) -> None:
        """Waits until everything is on the disk. Raises WriteError if something could not be written."""
        with self._writing():
            end = time.monotonic() + LONGEST_WRITE
            while self._manager.is_saving_in_progress():
                self._raise_failure()
                if time.monotonic() > end:
                    raise TimeoutError(f"it is not there after {LONGEST_WRITE} s")
                time.sleep(0.002)
            self._manager.wait_until_finished()
        self._note_when_written()
        if self._noting.ident is not None:
            self._noting.join()

    def discard(self, step: int, reason: str) -> None:
        """Renames a step that was saved, and then found not to be sound."""
        self.wait()
        self._rename(step, DamagedError(f"{step_name(self._folder / str(step))} is not sound: {reason}"))

    def close(self) -> None:
        """Waits until everything is on the disk. Raises WriteError if something could not be written, once."""
        with contextlib.suppress(WriteError) if self._failed else contextlib.nullcontext():
            self.wait()
            self._manager.close()


OUTCOMES = (None, DamagedError, LayoutError, VersionError, UnreadableError)
"""Of reading a step, from the best to that which decides for all processes."""


def _worst(outcome: int) -> int:
    """The highest of all processes, which wait here for each other."""
    return outcome if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(outcome)).max())


def _agreed(error: Exception) -> Exception:
    """An error that all processes raise."""
    error.agreed = True
    return error
