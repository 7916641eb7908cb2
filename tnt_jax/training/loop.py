"""A run from its configuration to its last step."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import rich.console

from tnt_jax.config import InputError, ModelChanges, TrainConfig, best_metric
from tnt_jax.storage.checkpoint import Checkpoints, NonFiniteError, WriteError
from tnt_jax.storage.lock import RunLock
from tnt_jax.storage.places import place
from tnt_jax.storage.reading import had_checkpoint, steps_of
from tnt_jax.storage.run import check_checkpoint_space, claim, compare, is_run
from tnt_jax.tasks.table import metric_of
from tnt_jax.training.agreement import agree_on_kernels
from tnt_jax.training.hosts import Hosts, facts, joined
from tnt_jax.training.report import Report, check_finite
from tnt_jax.training.run import Run, saved_trees
from tnt_jax.training.signals import Pauses, Signals, StoppedError, current_signals
from tnt_jax.training.step import TrainState

LONGEST_WAIT = 90
"""Seconds until a disk that processes share shows all of them what one has made."""


Scores = dict[str, float | None]
OnStep = Callable[[int, dict[str, jax.Array]], bool | None]
OnEpoch = Callable[[float, Scores], bool | None]


def train(
    config: TrainConfig[ModelChanges], *, on_step: OnStep | None = None, on_epoch: OnEpoch | None = None
) -> Scores:
    """Trains from where the run's folder stands to the last step.

    Args:
        on_step: called with each step, from 1 on, and its metrics, scalars on the devices. True ends the training; the
            step is evaluated and saved first. Of several processes, all must say the same.
        on_epoch: the same with the epochs that are over, and the scores, after each evaluation.

    Returns:
        The scores of the last step: count, and the metrics of the task (`tnt_jax.tasks`) for the averaged
        weights (`ema_`) and for the raw ones (`raw_`), None where one is undefined.

    Raises:
        InputError: something in the configuration or in the data is wrong. Raised before anything is written.
        NonFiniteError: a loss, a norm or a score was infinite or not a number. The last sound checkpoint is kept.
        WriteError: the run's folder cannot be written any more. No checkpoint that was written to its end is harmed.
        UnreadableError: a checkpoint cannot be read at the moment. Nothing was touched.
        RunningError: another process trains in the same folder.
        StoppedError: Ctrl-C or SIGTERM while it trained. The step that was under way is finished and saved first.
        LostError: a device or another process is gone, or not all came. The last checkpoint is kept.
    """
    began = time.perf_counter()
    signals = current_signals()
    # The hosts are inside: an error is told to the others before anything is closed, which may take long.
    place(config.run_dir)  # whether it can be reached
    with contextlib.ExitStack() as opened, joined(config.distributed, signals) as hosts:
        hosts.agree("is of another run", facts(config))
        # A notebook takes lines as a file does; its kernel asks for colours, which rich takes for a terminal.
        plain = {"force_jupyter": False, "force_terminal": False if "ipykernel" in sys.modules else None}
        console = rich.console.Console(highlight=False, markup=False, soft_wrap=True, quiet=hosts.index > 0, **plain)
        run = Run(config)
        hosts.agree("reads other data", run.content())
        agree_on_kernels(run.config.model)
        fresh_state = _open_run_dir(run, hosts, opened, console)
        signals.kept = lambda: _kept(config.run_dir)
        checkpoints = Checkpoints(
            config.run_dir, keep=config.keep_checkpoints, best_by=best_metric(config), warn=console.print
        )
        opened.enter_context(contextlib.closing(checkpoints))
        state = run.saved_state(checkpoints) or fresh_state
        called = Calls(on_step, on_epoch)
        scores = _train_from(state, run, checkpoints, hosts, console, signals, began, called)
        opened.close()
        return scores


class Calls(NamedTuple):
    """The callbacks of `train`, each of which may end it."""

    on_step: OnStep | None
    on_epoch: OnEpoch | None


def _open_run_dir(
    run: Run, hosts: Hosts, opened: contextlib.ExitStack, console: rich.console.Console
) -> TrainState | None:
    """Checks, locks and claims the run's folder, which process 0 does for all; the initial state of a run that begins.

    Raises:
        InputError, RunningError: the folder cannot be had.
    """
    config, content = run.config, run.content()
    changed = hosts.share(lambda: compare(config, content))
    begins = hosts.share(lambda: not had_checkpoint(config.run_dir))
    state = run.initial_state() if begins else None

    def take() -> None:
        check_checkpoint_space(config, run.state_bytes())
        opened.enter_context(RunLock(config.run_dir, console.print, _end_now))
        start = {"processes": hosts.count, "devices": jax.device_count()}
        claim(config, run.train_source.class_names, run.program.objective.outputs, content, changed, start)
        for name, (before, now) in (changed or {}).items():
            console.print(f"{name} was {before!r} and is now {now!r}")

    hosts.share(take)
    _wait_for(config.run_dir, hosts.index)
    run.epochs_before = changed["epochs"][0] if changed and "epochs" in changed else None
    return state


def _wait_for(run_dir: str, index: int) -> None:
    """Waits until this process sees the folder that process 0 has claimed: NFS remembers for long what was not there.

    Raises:
        InputError: it does not come.
    """
    end = time.monotonic() + LONGEST_WAIT
    while not is_run(run_dir):
        if time.monotonic() > end:
            raise InputError(
                f"{run_dir} of process 0 is not there on process {index}: a run must lie on a disk that all processes "
                "share"
            )
        time.sleep(0.5)


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


def _train_from(
    state: TrainState,
    run: Run,
    checkpoints: Checkpoints,
    hosts: Hosts,
    console: rich.console.Console,
    signals: Signals,
    began: float,
    called: Calls,
) -> Scores:
    """Trains from a state on, if that is not the last one; the scores of the last step."""
    config, start = run.config, int(state.step)
    # A run that was killed in an evaluation has saved the step, and not its scores.
    evaluated = hosts.share(lambda: start == 0 or not run.evaluates_after(start) or bool(checkpoints.scores(start)))
    if evaluated and (start == run.total_steps or run.stops_early(start, checkpoints)):
        console.print(f"The run in {config.run_dir} is finished. Use another --run-dir to start a new one.")
        return hosts.share(lambda: _conclude(start, checkpoints, run, console))
    console.print(run.describe(start))
    if run.epochs_before is not None:
        console.print(run.longer_schedule(run.epochs_before, start))
    pauses = Pauses(signals.received, config.checkpoint_every_minutes, config.checkpoint_every_steps, hosts.count)
    try:
        with (
            Report(
                config,
                console,
                start,
                run.total_steps,
                run.steps_per_epoch,
                began,
                split=run.test_source.name,
                evaluates_first=not evaluated,
            ) as report,
            contextlib.closing(run.batches(start)) as batches,
            signals.training(),
        ):
            if not evaluated and (number := _evaluate(run, start, state, checkpoints, report, pauses)):
                raise _stopped(start, run, number)
            step = start
            while step < run.total_steps and not run.stops_early(step, checkpoints):
                step += 1
                state, metrics = run.train_step(state, next(batches))
                report.train(step, metrics)
                checkpoints.check()
                ends = called.on_step is not None and called.on_step(step, metrics)
                evaluates, number = run.evaluates_after(step) or ends, pauses.stop()
                if not (evaluates or number or pauses.is_save_due(step)):
                    continue
                # Nothing of a step is saved before its loss and its norms are known to be finite.
                report.keep()
                with pauses.saving():
                    checkpoints.save(step, saved_trees(state))
                # Saved first: a run that is killed in its evaluation has lost no step.
                if evaluates and not number:
                    number = _evaluate(run, step, state, checkpoints, report, pauses)
                if number:  # also of the last step, which the next start evaluates
                    checkpoints.wait()
                    raise _stopped(step, run, number)
                if evaluates and called.on_epoch:
                    ends = called.on_epoch(step / run.steps_per_epoch, checkpoints.scores(step)) or ends
                if ends:
                    break
            checkpoints.wait()
    except (NonFiniteError, WriteError) as error:
        step = checkpoints.latest_step
        last = "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
        raise type(error)(f"{error}; {last}") from error.__cause__
    return hosts.share(lambda: _conclude(step, checkpoints, run, console))


def _evaluate(
    run: Run, step: int, state: TrainState, checkpoints: Checkpoints, report: Report, pauses: Pauses
) -> int | None:
    """Scores a step that was saved; the signal that stopped it."""
    number: int | None = None

    def stop() -> bool:
        nonlocal number
        number = pauses.stop()
        return number is not None

    scores = run.evaluate(state, stop)
    if scores is None:
        return number
    try:
        # Only what the network gives can show that it is broken: a metric may be undefined for these images.
        losses = {name: value for name, value in scores.items() if name.endswith("loss")}
        check_finite(f"an evaluation after step {step}", losses)
    except NonFiniteError as error:
        checkpoints.discard(step, str(error))
        raise
    report.test(step, scores)
    checkpoints.set_scores(step, scores)
    return number


def _stopped(step: int, run: Run, number: int) -> StoppedError:
    return StoppedError(
        f"stopped after step {step} of {run.total_steps}, which is saved; the same command goes on from there", number
    )


def _conclude(step: int, checkpoints: Checkpoints, run: Run, console: rich.console.Console) -> Scores:
    """The scores of the last step; process 0 prints them."""
    scores, best = checkpoints.scores(step), checkpoints.best_step
    if run.stops_early(step, checkpoints):
        console.print(
            f"Ended after epoch {step / run.steps_per_epoch:.4g} of {run.total_steps / run.steps_per_epoch:.4g}: "
            f"{run.config.early_stop.patience} evaluations in a row were worse than the best."
        )
    metric = metric_of(best_metric(run.config))
    ema, raw = (metric.text(scores[f"{weights}_{metric.name}"]) for weights in ("ema", "raw"))
    of_best = ""
    if best is not None:
        value = metric.text(checkpoints.scores(best)[f"ema_{metric.name}"])
        of_best = f" (best: {value} after epoch {best / run.steps_per_epoch:.4g})"
    console.print(
        f"{run.test_source.name} {metric.in_words} {ema} with averaged weights, {raw} with raw ones, over "
        f"{scores['count']:,} images{of_best}\nThe run lies in {run.config.run_dir}."
    )
    return scores
