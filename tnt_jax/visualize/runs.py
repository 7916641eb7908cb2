"""The course of a run: curves and schedule. Each returns a matplotlib figure."""

import json
import math
import os
from collections.abc import Sequence

import numpy as np

from tnt_jax.config import InputError, TrainConfig, best_metric
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import steps_per_epoch
from tnt_jax.storage.places import place
from tnt_jax.storage.run import read_config
from tnt_jax.tasks.metrics import Metric
from tnt_jax.tasks.table import TASKS, metric_of
from tnt_jax.training.optimizer import learning_rate_schedule
from tnt_jax.training.report import METRICS_FILE
from tnt_jax.visualize.canvas import new_figure

LINES = {"training batch": ("#94a4a2", "-"), "averaged weights": ("#3f90da", "-"), "raw weights": ("#bd1f01", "--")}


def metric_of_run(config: TrainConfig) -> Metric:
    """The metric by which the best checkpoint of a run is chosen, or where that is the loss the first of the task."""
    metric = metric_of(best_metric(config))
    return TASKS[config.data.task].metrics[0] if metric.name == "loss" else metric


def read_metrics(run_dir: str | os.PathLike) -> tuple[list[dict], list[dict]]:
    """The lines of training and of evaluations that a run has logged.

    Raises:
        InputError: there are none.
    """
    path = place(run_dir) / METRICS_FILE
    try:
        lines = [line for line in map(_parsed, path.read_text().splitlines()) if line]
    except OSError as error:
        raise InputError(f"{path} cannot be read as the metrics of a run: {error}") from error
    train, test = ([line for line in lines if line["kind"] == kind] for kind in ("train", "test"))
    if not train:
        raise InputError(f"{path} has no line of training yet")
    return train, test


def compare_curves(run_dirs: Sequence[str | os.PathLike]):
    """Loss of the training batches, the metric of the task with averaged weights, and the learning rate, of several
    runs of one task.

    Raises:
        InputError: as `curves`; or the runs are judged by different metrics.
    """
    configs = [read_config(run_dir) for run_dir in run_dirs]
    metrics = [metric_of_run(config) for config in configs]
    for metric, run_dir in zip(metrics, run_dirs, strict=True):
        if metric != metrics[0]:
            raise InputError(f"{run_dirs[0]} is judged by {metrics[0].title}, and {run_dir} by {metric.title}")
    metric, logged = metrics[0], [read_metrics(run_dir) for run_dir in run_dirs]
    scale = 100 if metric.proportion else 1
    figure = new_figure(10, 3.2 + 0.18 * len(run_dirs))
    loss, measure, rate = figure.subplots(1, 3)
    for number, ((train, test), run_dir) in enumerate(zip(logged, run_dirs, strict=True)):
        looks = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "label": str(run_dir)}
        _plot(loss, train, "loss", looks)
        _plot(measure, test, f"ema_{metric.name}", looks, scale)
        _plot(rate, train, "learning_rate", looks)
    named = f"{metric.in_words}, averaged weights" + (", %" if scale > 1 else "")
    for axes, title in ((loss, "loss of training batches"), (measure, named), (rate, "learning rate")):
        _over_epochs(axes, title)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def curves(run_dir: str | os.PathLike):
    """Loss, learning rate and the metric of the task over the epochs of a run, as far as it has come.

    That is the metric by which the best checkpoint is chosen, or where that is the loss the first of the task.

    Raises:
        InputError: the folder holds no run, or the run has logged nothing yet.
    """
    metric = metric_of_run(read_config(run_dir))
    train, test = read_metrics(run_dir)
    figure = new_figure(10, 3.2)
    loss, measure, rate = figure.subplots(1, 3)
    scale = 100 if metric.proportion else 1
    _line(loss, train, "loss", "training batch")
    if metric.of_batch:
        _line(measure, train, metric.of_batch, "training batch", scale)
    _line(rate, train, "learning_rate", "training batch")
    for name, weights in (("ema", "averaged weights"), ("raw", "raw weights")):
        _line(loss, test, f"{name}_loss", weights)
        _line(measure, test, f"{name}_{metric.name}", weights, scale)
    named = metric.in_words
    for axes, title in ((loss, "loss"), (measure, f"{named}, %" if scale > 1 else named), (rate, "learning rate")):
        _over_epochs(axes, title)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    evaluated = test[-1].get("split", "test") if test else "evaluated"
    figure.suptitle(f"{run_dir}: training batches as they were fed, {evaluated} images as they are", fontsize=9)
    return figure


def _parsed(line: str) -> dict | None:
    """A line of the metrics; None for the half line that a killed process leaves."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _line(axes, lines: Sequence[dict], field: str, label: str, scale: float = 1) -> None:
    colour, style = LINES[label]
    _plot(axes, lines, field, {"color": colour, "linestyle": style, "label": label}, scale)


def _plot(axes, lines: Sequence[dict], field: str, looks: dict, scale: float = 1) -> None:
    values = [math.nan if line[field] is None else scale * line[field] for line in lines]
    marker = "o" if len(values) == 1 else None  # a line of one point is not seen
    axes.plot([line["epoch"] for line in lines], values, marker=marker, **looks)


def _over_epochs(axes, title: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)


def schedule(config: TrainConfig):
    """The learning rate of a run over its epochs, with the ends of its warm-up and its cosine marked.

    The number of steps of an epoch comes from the training images where they are there; without them 100 are drawn.
    """
    optimizer = config.optimizer
    try:
        count = len(open_split(config.data, config.data.train_split))
        steps = steps_per_epoch(count, config.data, config.batch_size)
    except InputError:
        steps = 100
    rate = learning_rate_schedule(optimizer, steps_per_epoch=steps, epochs=config.epochs)
    end = config.epochs + optimizer.cooldown_epochs
    # Of the steps, at most two thousand, which is what a screen shows.
    drawn = np.unique(np.linspace(0, end * steps - 1, 2000).astype(int))
    figure = new_figure(6, 3.4)
    axes = figure.subplots()
    # The epochs that the schedule counts are whole numbers of steps; drawn as steps where it changes once an epoch.
    axes.step(drawn / steps, np.asarray(rate(drawn)), where="post", color=LINES["averaged weights"][0])
    for epoch, name in ((optimizer.warmup_epochs, "warm-up ends"), (config.epochs, "cosine ends")):
        if 0 < epoch < end:
            axes.axvline(epoch, color="#717581", linestyle=":", label=f"{name}: epoch {epoch:g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    _over_epochs(axes, f"learning rate, peak {optimizer.learning_rate:g}, {end} epochs")
    return figure
