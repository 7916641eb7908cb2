"""How a run went and where its model errs: curves, schedule, confusion, mistakes. Each returns a matplotlib figure."""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from tnt_jax.config import InputError, TrainConfig
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import steps_per_epoch
from tnt_jax.data.samples import to_channels
from tnt_jax.data.sources import Source
from tnt_jax.evaluation.scores import Answers, confusion_matrix
from tnt_jax.storage.run import read_config
from tnt_jax.training.optimizer import learning_rate_schedule
from tnt_jax.training.report import METRICS_FILE
from tnt_jax.visualize.canvas import new_figure, panels, show_image, title_of

LINES = {"training batch": ("#94a4a2", "-"), "averaged weights": ("#3f90da", "-"), "raw weights": ("#bd1f01", "--")}


def curves(run_dir: str | os.PathLike):
    """Loss, accuracy and learning rate over the epochs of a run, as far as it has come.

    Raises:
        InputError: the folder holds no run, or the run has logged nothing yet.
    """
    read_config(run_dir)
    path = pathlib.Path(run_dir) / METRICS_FILE
    try:
        lines = [line for line in map(_parsed, path.read_text().splitlines()) if line]
    except OSError as error:
        raise InputError(f"{path} cannot be read as the metrics of a run: {error}") from error
    train, test = ([line for line in lines if line["kind"] == kind] for kind in ("train", "test"))
    if not train:
        raise InputError(f"{path} has no line of training yet")
    figure = new_figure(10, 3.2)
    loss, accuracy, rate = figure.subplots(1, 3)
    _line(loss, train, "loss", "training batch")
    _line(accuracy, train, "accuracy", "training batch", 100)
    _line(rate, train, "learning_rate", "training batch")
    for name, weights in (("ema", "averaged weights"), ("raw", "raw weights")):
        _line(loss, test, f"{name}_loss", weights)
        _line(accuracy, test, f"{name}_top1", weights, 100)
    for axes, title in ((loss, "loss"), (accuracy, "accuracy, %"), (rate, "learning rate")):
        _over_epochs(axes, title)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{run_dir}: training batches as they were fed, test images as they are", fontsize=9)
    return figure


def _parsed(line: str) -> dict | None:
    """A line of the metrics; None for the half line that a killed process leaves."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _line(axes, lines: Sequence[dict], field: str, label: str, scale: float = 1) -> None:
    colour, style = LINES[label]
    values = [scale * line[field] for line in lines]
    axes.plot([line["epoch"] for line in lines], values, color=colour, linestyle=style, label=label)


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


def confusion(answers: Answers, class_names: Sequence[str]):
    """What images of each class were taken for: rows are the right classes, columns the answers, in percent of a row.

    Classes without images are left out of the rows; up to 20 classes, every cell has its number.
    """
    counts = confusion_matrix(answers, len(class_names))
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(class_names) <= 20
    side = 2.5 + 0.5 * len(class_names) if few else 8
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(drawn, label="% of the images of the class", shrink=0.8)
    axes.set_xlabel("answer")
    axes.set_ylabel("right class")
    if few:
        axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(class_names)), class_names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "black" if shares[row, column] > 55 else "white"
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    right = answers.right(1).mean()
    axes.set_title(f"{len(answers.labels):,} images, {right:.2%} right", fontsize=10)
    return figure


def mistakes(answers: Answers, images: Source, *, count: int = 24):
    """The wrong answers that the model was surest of, as images: the answer with its probability, and the right class.

    Raises:
        InputError: there is no wrong answer.
    """
    wrong = np.flatnonzero(~answers.right(1))
    if not len(wrong):
        raise InputError(f"there are no mistakes: all {len(answers.labels)} answers are right")
    surest = wrong[np.argsort(-answers.scores[wrong, 0], kind="stable")][:count]
    columns = min(8, len(surest))
    rows = -(-len(surest) // columns)
    figure = new_figure(1.5 * columns, 1.85 * rows + 0.4)
    for axes, index in zip(panels(figure, len(surest), columns), surest, strict=True):
        pixels, label = images[int(index)]
        pixels = np.asarray(pixels)
        show_image(axes, to_channels(pixels, 3) if pixels.shape[2] != 3 else pixels)
        answer = images.class_names[answers.top[index, 0]]
        title_of(axes, f"{_short(answer)} {answers.scores[index, 0]:.0%}\nis {_short(images.class_names[label])}")
    total = f"{len(wrong):,} of {len(answers.labels):,} answers are wrong"
    figure.suptitle(f"{total}; those that the model was surest of", fontsize=9)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
