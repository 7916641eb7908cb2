"""A run from its configuration to its last step."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import rich.console
from jax.experimental import multihost_utils

from tnt_jax.config import InputError, ModelChanges, TrainConfig, best_metric
from tnt_jax.data.pipeline import Batch
from tnt_jax.storage.checkpoint import Checkpoints, NonFiniteError, WriteError
from tnt_jax.storage.lock import RunLock
from tnt_jax.storage.reading import had_checkpoint, steps_of
from tnt_jax.storage.run import check_space, claim, compare, is_run
from tnt_jax.training.agreement import agree_on_content, agree_on_kernels, facts
from tnt_jax.training.metrics import printed, spoken
from tnt_jax.training.processes import process_group
from tnt_jax.training.report import Report, check_finite
from tnt_jax.training.run import Run, saved_trees
from tnt_jax.training.saving import SaveClock
from tnt_jax.training.step import TrainState
from tnt_jax.training.stopping import Signals, StoppedError, current_signals


def train(config: TrainConfig[ModelChanges]) -> dict[str, float]:
    """Trains from where the run's folder stands to the last step.

    Returns:
        The scores of the last step: count, and the metrics of the task (`tnt_jax.config.TASKS`) for the averaged
        weights (`ema_`) and for the raw ones (`raw_`).

    Raises:
        InputError: something in the configuration or in the data is wrong. Raised before anything is written.
        NonFiniteError: a loss, a norm or a score was infinite or not a number. The last sound checkpoint is kept.
        WriteError: the run's folder cannot be written any more. No checkpoint that was written to its end is harmed.
        UnreadableError: a checkpoint cannot be read at the moment. Nothing was touched.
        RunningError: another process trains in the same folder.
        StoppedError: Ctrl-C or SIGTERM while it trained. The step that was under way is finished and saved first.
        PeersError: not all processes of the run came.
    """
    began = time.perf_counter()
    listening = current_signals()
    with process_group(config.distributed, facts(config), listening):
        console = rich.console.Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0)
        run = Run(config)
        with _claimed(run, console) as fresh_state:
            listening.kept = lambda: _kept(config.run_dir)
            with contextlib.closing(
                Checkpoints(
                    config.run_dir, keep=config.keep_checkpoints, best_by=best_metric(config), warn=console.print
                )
            ) as checkpoints:
                state = run.saved_state(checkpoints) or fresh_state
                return _from(state, run, checkpoints, console, listening, began)


@contextlib.contextmanager
def _claimed(run: Run, console: rich.console.Console) -> Iterator[TrainState | None]:
    """The run's folder, checked, locked and claimed by process 0, as a context; the initial state of a run that begins.

    Raises:
        InputError, RunningError: the folder cannot be had.
    """
    config, content = run.config, run.content()
    agree_on_content(content)
    agree_on_kernels(config.model)
    first = jax.process_index() == 0
    changed = compare(config, content) if first else None
    begins = _decided(not had_checkpoint(config.run_dir))
    state = run.initial_state() if begins else None
    with contextlib.ExitStack() as held:
        if first:
            check_space(config, run.state_bytes())
            held.enter_context(RunLock(config.run_dir, console.print, _end_now))
            start = {"processes": jax.process_count(), "devices": jax.device_count()}
            claim(config, run.train_source.class_names, run.program.objective.outputs, content, changed, start)
            for name, (before, now) in (changed or {}).items():
                console.print(f"{name} was {before!r} and is now {now!r}")
        _meet_in(config.run_dir)
        run.epochs_before = changed["epochs"][0] if changed and "epochs" in changed else None
        yield state


def _decided(by_process_0: bool) -> bool:
    """What process 0 sees, for all: disks may show others something else."""
    if jax.process_count() == 1:
        return by_process_0
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(by_process_0)))


def _meet_in(run_dir: str) -> None:
    """Waits for process 0. Raises InputError if its folder is not there for this process."""
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices("run folder")
    if not is_run(run_dir):
        raise InputError(
            f"{run_dir} of process 0 is not there on process {jax.process_index()}: a run must lie on a disk that all "
            "processes share"
        )


def _end_now(reason: str) -> None:
    """Ends this process without a further write."""
    print(f"error: {reason}", flush=True)
    os._exit(1)


def _kept(run_dir: str) -> str:
    steps = steps_of(run_dir)
    return (
        f"the checkpoint of step {steps[-1]} is kept, and the same command goes on from there"
        if steps
        else "there is no checkpoint yet, and the same command begins again"
    )


def _from(
    state: TrainState,
    run: Run,
    checkpoints: Checkpoints,
    console: rich.console.Console,
    listening: Signals,
    began: float,
) -> dict[str, float]:
    """Trains from a state on, if that is not the last one."""
    start = int(state.step)
    # A run that was killed in an evaluation has saved the step, and not its scores.
    evaluated = start == 0 or not run.evaluates_after(start) or checkpoints.scores(start)
    if start == run.total_steps and evaluated:
        console.print(f"The run in {run.config.run_dir} is finished. Another --run-dir starts another one.")
        return _conclude(checkpoints, run, console)
    console.print(run.describe(start))
    if run.epochs_before is not None:
        console.print(run.longer_schedule(run.epochs_before, start))
    try:
        with (
            Report(
                run.config,
                console,
                start,
                run.total_steps,
                run.steps_per_epoch,
                began,
                evaluates_first=not evaluated,
            ) as report,
            contextlib.closing(run.batches(start)) as batches,
            listening.training(jax.process_count() > 1) as stop,
        ):
            if not evaluated and (number := _evaluate(run, start, state, checkpoints, report, stop)):
                raise _stopped(start, run, number)
            _take_steps(run, state, batches, checkpoints, report, stop)
            checkpoints.wait()
    except (NonFiniteError, WriteError) as error:
        step = checkpoints.latest_step
        last = "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
        raise type(error)(f"{error}; {last}") from error.__cause__
    return _conclude(checkpoints, run, console)


def _take_steps(
    run: Run,
    state: TrainState,
    batches: Iterator[Batch],
    checkpoints: Checkpoints,
    report: Report,
    stop: Callable[[], int | None],
) -> None:
    clock = SaveClock(run.config.checkpoint_every_minutes, run.config.checkpoint_every_steps)
    for step in range(int(state.step) + 1, run.total_steps + 1):
        state, metrics = run.train_step(state, next(batches))
        report.train(step, metrics)
        checkpoints.check()
        evaluates, number = run.evaluates_after(step), stop()
        if not (clock.is_due(step) or evaluates or number):
            continue
        # Nothing of a step is saved before its loss and its norms are known to be finite.
        report.flush()
        with clock.saving():
            checkpoints.save(step, saved_trees(state))
        if evaluates and not number:
            number = _evaluate(run, step, state, checkpoints, report, stop)
            evaluates = number is None
        if number and not (step == run.total_steps and evaluates):
            checkpoints.wait()
            raise _stopped(step, run, number)


def _evaluate(
    run: Run,
    step: int,
    state: TrainState,
    checkpoints: Checkpoints,
    report: Report,
    stop: Callable[[], int | None],
) -> int | None:
    """Scores a step that was saved; the signal that stopped it."""
    stopped: list[int] = []

    def stop_between() -> int | None:
        if number := stop():
            stopped.append(number)
        return number

    scores = run.evaluate(state, stop_between)
    if scores is None:
        return stopped[0]
    try:
        # Only what the network gives can show that it is broken: a metric may be undefined for these images.
        losses = {name: value for name, value in scores.items() if name.endswith("loss")}
        check_finite(f"an evaluation after step {step}", losses)
    except NonFiniteError as error:
        checkpoints.discard(step, str(error))
        raise
    report.test(step, scores)
    checkpoints.set_scores(step, scores)
    return stopped[0] if stopped else None


def _stopped(step: int, run: Run, number: int) -> StoppedError:
    return StoppedError(
        f"stopped after step {step} of {run.total_steps}, which is saved; the same command goes on from there", number
    )


def _conclude(checkpoints: Checkpoints, run: Run, console: rich.console.Console) -> dict[str, float]:
    scores, best = checkpoints.scores(run.total_steps), checkpoints.best_step
    metric = best_metric(run.config)
    ema, raw = (printed(metric, scores[f"{weights}_{metric}"]) for weights in ("ema", "raw"))
    of_best = ""
    if best is not None:
        value = printed(metric, checkpoints.scores(best)[f"ema_{metric}"])
        of_best = f" (best: {value} after epoch {best / run.steps_per_epoch:.4g})"
    console.print(
        f"test {spoken(metric)} {ema} with averaged weights, {raw} with raw ones, over {scores['count']:,} images"
        f"{of_best}\nThe run lies in {run.config.run_dir}."
    )
    return scores
