"""What a person watches: a progress bar or plain lines, TensorBoard, and metrics.jsonl in the run's folder."""

import io
import json
import math
import pathlib
import time

import jax
import rich.console
import rich.progress
from tensorboardX import SummaryWriter

from tnt_jax.config import TrainConfig

METRICS_FILE = "metrics.jsonl"


class NonFiniteLossError(RuntimeError):
    """The loss of a step was infinite or not a number; the run stops before anything is saved of it."""

    exit_code = 1


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
    ):
        self.start_step, self.total_steps, self.steps_per_epoch = start_step, total_steps, steps_per_epoch
        self.batch_size, self.log_every = config.batch_size, config.log_every_steps
        self.console = console
        self._pending: tuple[int, dict] | None = None
        self._clock, self._clock_step = time.perf_counter(), start_step
        self._rate = float("nan")
        folder = pathlib.Path(config.run_dir)
        self._jsonl = _reopen(folder / METRICS_FILE, start_step)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
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
            NonFiniteLossError: the loss of the step before was not finite.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Logs what is still waiting."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLossError(f"the loss of step {step} is {metrics['loss']}")
        now = time.perf_counter()
        if step == self.start_step + 1:  # The first step was compiled: its time says nothing of the rate.
            self._clock, self._clock_step = now, step
        if step % self.log_every == 0 or step == self.total_steps:
            if step > self._clock_step:
                self._rate = (step - self._clock_step) * self.batch_size / (now - self._clock)
            self._write("train", step, metrics | {"images_per_second": self._rate})
        epoch = f"{math.ceil(step / self.steps_per_epoch)}/{math.ceil(self.total_steps / self.steps_per_epoch)}"
        text = f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.1%}  {self._rate:.0f} images/s"
        self._progress.update(self._task, completed=step, epoch=epoch, text=text)
        if not self.console.is_terminal and step % self.steps_per_epoch == 0:
            left = (self.total_steps - step) * self.batch_size / self._rate
            self.console.print(f"epoch {epoch}  {text}  {left:.0f} s left")

    def test(self, step: int, scores: dict[str, float]) -> None:
        """Logs an evaluation after step `step`."""
        self._write("test", step, scores)
        self.console.print(
            f"epoch {step / self.steps_per_epoch:.4g}  test accuracy {scores['ema_top1']:.2%} averaged weights, "
            f"{scores['raw_top1']:.2%} raw"
        )
        # What passed since the last step was not training.
        self._clock, self._clock_step = time.perf_counter(), step

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        epoch = step / self.steps_per_epoch
        self._jsonl.write(json.dumps({"kind": kind, "step": step, "epoch": epoch} | values) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()
        self._jsonl.close()
        self._tensorboard.close()


def _reopen(path: pathlib.Path, start_step: int) -> io.TextIOWrapper:
    """The metrics file, without what an earlier process wrote after the step from which this one goes on."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= start_step]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(f"{line}\n" for line in kept))
    replacement.replace(path)
    return path.open("a")


def _step_of(line: str) -> float:
    """The step of a line; infinite for the half line that a killed process leaves."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
