"""The report of a run: a progress bar or plain lines, TensorBoard, and metrics.jsonl in the run's folder."""

import contextlib
import importlib.util
import io
import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import jax
import rich.console
import rich.progress

from tnt_jax.chips import chip_of, training_flops
from tnt_jax.config import InputError, TrainConfig, best_metric
from tnt_jax.models.summary import count_macs
from tnt_jax.storage.checkpoint import NonFiniteError, WriteError
from tnt_jax.storage.description import to_json
from tnt_jax.storage.files import write_text
from tnt_jax.storage.places import Spool, is_bucket, place
from tnt_jax.tasks.table import METRICS, metric_of

METRICS_FILE = "metrics.jsonl"
DROPPED_FILE = "metrics_dropped.jsonl"
"""Lines of steps that were taken again, after a start that went back to a checkpoint."""
IDENTITY_FILE = "wandb_id.txt"


def check_finite(what: str, values: dict[str, float]) -> None:
    """Raises NonFiniteError if one of them is infinite or not a number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"the {name.replace('_', ' ')} of {what} is {value}")


def duration(seconds: float) -> str:
    """For people: 12 s, 7 min, 5 h 20 min, 3 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 24 * 60 else f"{hours // 24} d {hours % 24} h"


class Report:
    """Logs a run, as a context.

    The metrics of a step are fetched when those of the next one arrive, so that devices never wait for the log.
    """

    def __init__(
        self,
        config: TrainConfig,
        console: rich.console.Console,
        start_step: int,
        total_steps: int,
        steps_per_epoch: int,
        began: float,
        *,
        split: str = "test",
        evaluates_first: bool = False,
    ):
        self.split = split
        self.start_step, self.total_steps, self.steps_per_epoch = start_step, total_steps, steps_per_epoch
        self.batch_size, self.log_every = config.batch_size, config.log_every_steps
        self.console, self.judged_by = console, metric_of(best_metric(config))
        self._pending: tuple[int, dict] | None = None
        self._began, self._compiling = began, _compile_seconds()
        self._clock, self._clock_step = time.perf_counter(), start_step
        self._rate = float("nan")
        self.log_every_seconds, self._line = config.log_every_seconds, time.perf_counter()
        self._since: list[dict[str, float]] = []
        """Metrics of the steps since the last line that was printed where there is no terminal."""
        chip = chip_of(jax.devices()[0].device_kind)
        flops = training_flops(sum(count_macs(config.model).values()))
        self._peak_rate = jax.device_count() * chip.flops / flops if chip else None
        self._trace = _Trace(pathlib.Path(config.run_dir) / "profile", start_step) if config.profile else None
        self._logs = _open_logs(config, start_step, evaluates_first, console.print)
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("epoch {task.fields[epoch]}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=self.total_steps, completed=start_step, epoch="", text="compiling"
        )
        self._progress.start()

    def train(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of step `step` (from 1) and logs those of the step before.

        Raises:
            NonFiniteError: the loss or a norm of the step before was not finite.
        """
        self.flush()
        self._pending = (step, metrics)
        if self._trace:
            self._trace.after(step, metrics)

    def flush(self) -> None:
        """Logs what is still waiting."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        check_finite(f"step {step}", {"loss": metrics["loss"]} | metrics)
        now = time.perf_counter()
        if step == self.start_step + 1:  # The first step was compiled: its time says nothing of the rate.
            self._clock, self._clock_step = now, step
            self.console.print(
                f"first step done {now - self._began:.1f} s after the start, {self._compiling():.1f} s of it compiling"
            )
        if step % self.log_every == 0 or step == self.total_steps:
            if step > self._clock_step:
                self._rate = (step - self._clock_step) * self.batch_size / (now - self._clock)
            rate = {} if math.isnan(self._rate) else {"images_per_second": self._rate}
            self._write("train", step, metrics | rate)
        epoch = f"{math.ceil(step / self.steps_per_epoch)}/{math.ceil(self.total_steps / self.steps_per_epoch)}"
        self._progress.update(self._task, completed=step, epoch=epoch, text=self._in_words(metrics))
        self._since.append(metrics)
        ends, waited = step % self.steps_per_epoch == 0, now - self._line >= self.log_every_seconds
        if not self.console.is_terminal and (ends or waited):
            left = (self.total_steps - step) * self.batch_size / self._rate
            where = f"epoch {epoch}" if ends else f"epoch {epoch}, step {step:,} of {self.total_steps:,}"
            means = {name: sum(each[name] for each in self._since) / len(self._since) for name in metrics}
            rest = "" if math.isnan(left) else f"  {duration(left)} left"
            self.console.print(f"{where}  {self._in_words(means)}{rest}")
            self._since, self._line = [], now

    def keep(self) -> None:
        """Logs what is still waiting, where a kill does not reach it: before a step is saved."""
        self.flush()
        with _writing("the log"):
            for log in self._logs:
                if isinstance(log, Spool):
                    log.send()

    def _in_words(self, metrics: dict[str, float]) -> str:
        text = f"loss {metrics['loss']:.3f}"
        for metric in (METRICS[name] for name in metrics if name in METRICS and name != "loss"):
            text += f"  {metric.title} {metrics[metric.name]:{'.1%' if metric.proportion else '.3f'}}"
        if not math.isnan(self._rate):
            text += f"  {self._rate:.0f} images/s"
        if self._peak_rate and not math.isnan(self._rate):
            text += f"  {self._rate / self._peak_rate:.1%} of the chips' peak"
        return text

    def test(self, step: int, scores: dict[str, float]) -> None:
        """Logs an evaluation after step `step`."""
        self._write("test", step, {"split": self.split} | scores)
        self.console.print(
            f"epoch {step / self.steps_per_epoch:.4g}  {self.split} {self.judged_by.in_words} "
            f"{self.judged_by.text(scores[f'ema_{self.judged_by.name}'])} averaged weights, "
            f"{self.judged_by.text(scores[f'raw_{self.judged_by.name}'])} raw"
        )
        # What passed since the last step was not training.
        self._clock, self._clock_step = time.perf_counter(), step

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        with _writing(f"the log of step {step}"):
            for log in self._logs:
                log.write(kind, step, {"epoch": step / self.steps_per_epoch} | values)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()
        if self._trace:
            self._trace.close()
        for log in self._logs:
            with contextlib.suppress(OSError):  # what could not be written was told where it happened
                log.close()


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"{what} cannot be written: {error.strerror or error}") from error


class _JsonLines:
    """One line of `metrics.jsonl` for every call."""

    def __init__(self, folder: pathlib.Path, start_step: int, evaluates_first: bool):
        self._file = _reopen(folder / METRICS_FILE, start_step, evaluates_first)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step} | values, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps tensorboardX from importing PyTorch where it is installed: seconds of every start, for nothing."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # as if it was not installed
    try:
        yield
    finally:
        del sys.modules["torch"]


class _TensorBoard:
    """Event files, written at once.

    tensorboardX's own `SummaryWriter` writes in a thread, which dies where the disk is full or the clock jumps; the
    training then waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, start_step: int):
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder = folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # Two starts within a second must not write the same file.
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{uuid.uuid4().hex[:8]}")
        # What an earlier process wrote after this step is hidden.
        start = {"step": start_step + 1, "wall_time": time.time()}
        self._writer.write_event(Event(**start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        for name in sorted(name for name in values.keys() - {"epoch", "split"} if values[name] is not None):
            summary = self._scalar(f"{values.get('split', kind)}/{name}", values[name])
            self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run there for the run here, also after it was stopped and started again.

    Steps are a value of their own: its own steps must rise, and drop the scores of an evaluation that is done again.
    What goes wrong there (no key, no network) is said, and the run goes on without it.
    """

    def __init__(self, folder: pathlib.Path, config: TrainConfig, say: Callable[[str], None]):
        import wandb

        self._say, self._run = say, None
        identity = folder / IDENTITY_FILE
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12])
        with self._or_without():
            self._run = wandb.init(
                project="tnt_jax",
                name=os.path.basename(config.run_dir.rstrip("/")),
                id=identity.read_text(),
                resume="allow",
                dir=str(folder),
                config=to_json(config),
                settings={"init_timeout": 30},
            )
            self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: dict[str, float | None]) -> None:
        if self._run is not None:
            with self._or_without():
                kind = values.get("split", kind)
                scores = {name: value for name, value in values.items() if value is not None and name != "split"}
                named = {f"{kind}/{name}": value for name, value in scores.items()}
                self._run.log({"step": step, **named})

    def close(self) -> None:
        if self._run is not None:
            with self._or_without():
                self._run.finish()

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its own, of many types
            self._run = None
            first = next(iter(str(error).splitlines()), type(error).__name__)
            self._say(f"note: Weights & Biases: {first}. Nothing more is logged there")


def check_wandb(config: TrainConfig) -> None:
    """Raises InputError if Weights & Biases is asked for and not installed."""
    if config.wandb and not importlib.util.find_spec("wandb"):
        raise InputError("--wandb needs the package of Weights & Biases: pip install wandb")


def _open_logs(config: TrainConfig, start_step: int, evaluates_first: bool, say: Callable[[str], None]) -> list:
    """The loggers of metrics. Only the first process writes."""
    if jax.process_index() > 0:
        return []
    folder = place(config.run_dir)
    with _writing(f"what is logged in {folder}"):
        spool = Spool(folder, (METRICS_FILE, DROPPED_FILE, IDENTITY_FILE)) if is_bucket(folder) else None
        folder = spool.folder if spool else folder
        logs = [_JsonLines(folder, start_step, evaluates_first), _TensorBoard(folder, start_step)]
        logs += [_WeightsAndBiases(folder, config, say)] if config.wandb else []
        return [*logs, spool] if spool else logs


class _Trace:
    """XProf's trace of three steps, from the second after the start, when all is compiled."""

    def __init__(self, folder: pathlib.Path, start_step: int):
        self._folder, self._first, self._running = folder, start_step + 2, False

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        if step == self._first:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step == self._first + 3:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def _compile_seconds() -> Callable[[], float]:
    """Begins to count; the function tells how many seconds JAX has compiled since, and ends the count."""
    durations = []

    def listen(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)

    def stop() -> float:
        jax.monitoring.unregister_event_duration_listener(listen)
        return sum(durations)

    return stop


def _reopen(path: pathlib.Path, start_step: int, evaluates_first: bool) -> io.TextIOWrapper:
    """The metrics file, without what an earlier process wrote after the step from which this one goes on.

    Those lines are kept in another file.

    Args:
        evaluates_first: whether the evaluation of that step is done again.
    """
    end = (start_step, "test" if evaluates_first else "")
    kept, dropped = [], []
    for line in path.read_text().splitlines() if path.exists() else []:
        place = _place_of(line)
        (kept if place[0] <= start_step and place != end else dropped).append(f"{line}\n")
    if dropped:
        with path.with_name(DROPPED_FILE).open("a") as file:
            file.writelines(dropped)
        write_text(path, "".join(kept))
    return path.open("a")


def _place_of(line: str) -> tuple[float, str]:
    """Step and kind of a line; infinite for the half line that a killed process leaves."""
    try:
        values = json.loads(line)
        return values["step"], values["kind"]
    except (ValueError, KeyError, TypeError):
        return math.inf, ""
