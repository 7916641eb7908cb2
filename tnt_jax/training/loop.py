"""A run from its configuration to its last step."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import rich.console

from tnt_jax.config import InputError, ModelChanges, TrainConfig, best_metric
from tnt_jax.data.pipeline import Batch
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
    place(config.run_dir)  # whether it can be reached
    signals = current_signals()
    # The hosts are inside: an error is told to the others before anything is closed, which may take long.
    with contextlib.ExitStack() as opened, joined(config.distributed, signals) as hosts:
        console = _console(quiet=hosts.index > 0)
        run, checkpoints, state, changed = _set_up(config, hosts, opened, console, signals)
        step = int(state.step)
        # A run that was killed in an evaluation has saved the step, and not its scores.
        evaluated = hosts.share(lambda: step == 0 or not run.evaluates_after(step) or bool(checkpoints.scores(step)))
        if evaluated and (step == run.total_steps or run.stops_early(step, checkpoints)):
            console.print(f"The run in {config.run_dir} is finished. Use another --run-dir to start a new one.")
        else:
            console.print(run.describe(step))
            if "epochs" in changed:
                console.print(run.longer_schedule(changed["epochs"][0], step))
            minutes, steps = config.checkpoint_every_minutes, config.checkpoint_every_steps
            pauses = Pauses(signals.received, minutes, steps, hosts.count)
            sizes, split = (step, run.total_steps, run.steps_per_epoch), run.test_source.name
            with (
                _last_sound_step_named(checkpoints),
                Report(run.config, console, *sizes, began, split=split, evaluates_first=not evaluated) as report,
                contextlib.closing(run.batches(step)) as batches,
                signals.training(),
            ):
                loop = _Loop(run, checkpoints, report, pauses, on_step, on_epoch)
                ends = not evaluated and loop.evaluate(step, state)
                step = loop.take_steps(step, state, batches, ends=ends)
        scores = hosts.share(lambda: _conclude(step, checkpoints, run, console))
        opened.close()
        return scores


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The loop of a run: its steps, and what is saved and evaluated between them."""

    run: Run
    checkpoints: Checkpoints
    report: Report
    pauses: Pauses
    on_step: OnStep | None
    on_epoch: OnEpoch | None

    def take_steps(self, start: int, state: TrainState, batches: Iterator[Batch], *, ends: bool) -> int:
        """Takes the steps after `start`, none where the run `ends` with it; the last one that was taken.

        Raises:
            StoppedError: a signal has come.
        """
        run, checkpoints, step = self.run, self.checkpoints, start
        after = () if ends or run.stops_early(start, checkpoints) else range(start + 1, run.total_steps + 1)
        # The order within a step is what makes a run that is killed anywhere go on as if it had not been.
        for step in after:
            state, metrics = run.train_step(state, next(batches))
            self.report.train(step, metrics)
            checkpoints.check()
            ends = self.on_step is not None and self.on_step(step, metrics)
            evaluates, number = run.evaluates_after(step) or ends, self.pauses.stop()
            if not (evaluates or number or self.pauses.is_save_due(step)):
                continue
            # Nothing of a step is saved before its loss and its norms are known to be finite.
            self.report.keep()
            with self.pauses.saving():
                checkpoints.save(step, saved_trees(state))
            # Saved first: a run that is killed in its evaluation has lost no step.
            if number:  # also of the last step, which the next start evaluates
                self._stop(step, number)
            if evaluates:
                ends = self.evaluate(step, state) or ends
            if ends or run.stops_early(step, checkpoints):
                break
        checkpoints.wait()
        return step

    def evaluate(self, step: int, state: TrainState) -> bool:
        """Scores a step that was saved; True where the caller ends the run with it.

        Raises:
            StoppedError: a signal came before the end.
        """
        number: int | None = None

        def stop() -> bool:
            nonlocal number
            number = self.pauses.stop()
            return number is not None

        scores = self.run.evaluate(state, stop)
        if scores is None:
            self._stop(step, number)
        try:
            # Only what the network gives can show that it is broken: a metric may be undefined for these images.
            losses = {name: value for name, value in scores.items() if name.endswith("loss")}
            check_finite(f"an evaluation after step {step}", losses)
        except NonFiniteError as error:
            self.checkpoints.discard(step, str(error))
            raise
        self.report.test(step, scores)
        self.checkpoints.set_scores(step, scores)
        return bool(self.on_epoch and self.on_epoch(step / self.run.steps_per_epoch, self.checkpoints.scores(step)))

    def _stop(self, step: int, number: int) -> NoReturn:
        self.checkpoints.wait()
        raise StoppedError(
            f"stopped after step {step} of {self.run.total_steps}, which is saved; the same command goes on from there",
            number,
        )


@contextlib.contextmanager
def _last_sound_step_named(checkpoints: Checkpoints) -> Iterator[None]:
    """An error that ends the run says from which step it can go on."""
    try:
        yield
    except (NonFiniteError, WriteError) as error:
        step = checkpoints.latest_step
        last = "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
        raise type(error)(f"{error}; {last}") from error.__cause__


def _console(*, quiet: bool) -> rich.console.Console:
    # A notebook takes lines as a file does; its kernel asks for colours, which rich takes for a terminal.
    terminal = False if "ipykernel" in sys.modules else None
    return rich.console.Console(
        highlight=False, markup=False, soft_wrap=True, quiet=quiet, force_jupyter=False, force_terminal=terminal
    )


def _set_up(
    config: TrainConfig[ModelChanges],
    hosts: Hosts,
    opened: contextlib.ExitStack,
    console: rich.console.Console,
    signals: Signals,
) -> tuple[Run, Checkpoints, TrainState, dict[str, list]]:
    """The run, its checkpoints, the state from which it goes on, and what changed since its last start.

    Raises:
        InputError, RunningError, UnreadableError: as `train`.
    """
    hosts.agree("is of another run", lambda: facts(config))
    run = Run(config)
    content = run.content()
    hosts.agree("reads other data", lambda: content)
    agree_on_kernels(run.config.model)
    fresh_state, changed = _open_run_dir(run, content, hosts, opened, console)
    signals.kept = lambda: _kept(config.run_dir)
    checkpoints = Checkpoints(
        config.run_dir, keep=config.keep_checkpoints, best_by=best_metric(config), warn=console.print
    )
    opened.enter_context(contextlib.closing(checkpoints))
    return run, checkpoints, run.saved_state(checkpoints) or fresh_state, changed


def _open_run_dir(
    run: Run, content: dict[str, str], hosts: Hosts, opened: contextlib.ExitStack, console: rich.console.Console
) -> tuple[TrainState | None, dict[str, list]]:
    """Checks, locks and claims the run's folder, which process 0 does for all.

    Returns:
        The initial state of a run that begins, and what changed since its last start.

    Raises:
        InputError, RunningError: the folder cannot be had.
    """
    config = run.config
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
    return state, changed or {}


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
