"""How a run went: curves and schedule. Each returns a matplotlib figure."""

import json
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from tnt_jax.config import InputError, TrainConfig, best_metric
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import steps_per_epoch
from tnt_jax.storage.run import read_config
from tnt_jax.tasks.table import TASKS, metric_of
from tnt_jax.training.optimizer import learning_rate_schedule
from tnt_jax.training.report import METRICS_FILE
from tnt_jax.visualize.canvas import new_figure

LINES = {"training batch": ("#94a4a2", "-"), "averaged weights": ("#3f90da", "-"), "raw weights": ("#bd1f01", "--")}


def curves(run_dir: str | os.PathLike):
    """Loss, learning rate and the metric of the task over the epochs of a run, as far as it has come.

    That is the metric by which the best checkpoint is chosen, or where that is the loss the first of the task.

    Raises:
        InputError: the folder holds no run, or the run has logged nothing yet.
    """
    config = read_config(run_dir)
    metric = metric_of(best_metric(config))
    metric = TASKS[config.data.task].metrics[0] if metric.name == "loss" else metric
    path = pathlib.Path(run_dir) / METRICS_FILE
    try:
        lines = [line for line in map(_parsed, path.read_text().splitlines()) if line]
    except OSError as error:
        raise InputError(f"{path} cannot be read as the metrics of a run: {error}") from error
    train, test = ([line for line in lines if line["kind"] == kind] for kind in ("train", "test"))
    if not train:
        raise InputError(f"{path} has no line of training yet")
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
    values = [math.nan if line[field] is None else scale * line[field] for line in lines]
    marker = "o" if len(values) == 1 else None  # a line of one point is not seen
    axes.plot([line["epoch"] for line in lines], values, color=colour, linestyle=style, label=label, marker=marker)


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
