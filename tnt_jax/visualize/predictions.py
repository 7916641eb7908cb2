"""The mistakes of a model, by its task: confusion and the worst images. Each returns a matplotlib figure."""

import os
from collections.abc import Sequence

import numpy as np

from tnt_jax.data.crop import resized_to_fit
from tnt_jax.data.samples import visible
from tnt_jax.data.sources import Split
from tnt_jax.tasks.task import Matrix, Predictions, Scatter
from tnt_jax.visualize.canvas import new_figure, panels, shorten, show_image, title_of

MOST_NUMBERS = 20
"""Up to so many classes every cell of a matrix has its number."""


def confusion(predictions: Predictions, class_names: Sequence[str], *, data: str = ""):
    """The classes that images were taken for.

    single_label: rows are the true classes, columns the predicted ones; classes without images have an empty row.
    multi_label: the images with a label (row) that were given each label (column); the diagonal is recall, and the last
    row has the images without any label. Numbers are images, colours percent of a row. regression: each
    prediction over its target.

    Args:
        data: what the title says of the images, such as their source and split.
    """
    shown = predictions.confusion(class_names)
    if isinstance(shown, Scatter):
        return _scatter(shown, class_names, data)
    return _matrix(shown._replace(title=_titled(shown.title, data)))


def _titled(title: str, data: str) -> str:
    return f"{shorten(data)}: {title}" if data else title


def _matrix(shown: Matrix):
    counts, totals, rows, columns, title, of = shown
    shares = 100 * counts / np.maximum(totals, 1)[:, None]
    few = len(columns) <= MOST_NUMBERS
    rows, columns = (list(map(shorten, names)) for names in (rows, columns))
    of_names = 0.08 * max(map(len, rows)) if few else 0  # inches beside and below the matrix
    side = 2.5 + 0.5 * len(columns) if few else 8
    figure = new_figure(max(side + 0.8 + of_names, 0.085 * len(title)), side + of_names)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(drawn, label=f"% of the {of} of the class", shrink=0.8)
    axes.set_xlabel("prediction")
    axes.set_ylabel("right class")
    if few:
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "black" if shares[row, column] > 55 else "white"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(title, fontsize=10)
    return figure


MOST_POINTS = 5000


def _scatter(shown: Scatter, names: Sequence[str], data: str):
    """A panel for each target; of many images 5,000, evenly spread."""
    drawn = np.unique(np.linspace(0, len(shown.targets) - 1, MOST_POINTS).astype(int))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(3.4 * columns, 3.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for output, (axes, name) in enumerate(zip(grid, names, strict=False)):
        target, value = shown.targets[drawn, output], shown.values[drawn, output]
        ends = [min(target.min(), value.min()), max(target.max(), value.max())]
        axes.plot(ends, ends, color="#717581", linewidth=1)
        axes.scatter(target, value, s=6, color="#3f90da", alpha=0.5, linewidths=0)
        axes.set_xlabel(f"{name}, target")
        axes.set_ylabel("prediction")
        axes.set_title(shown.titles[output], fontsize=9)
    if data:
        figure.suptitle(data, fontsize=9)
    return figure


def beside(pixels: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """An image and a picture of it, whole, at the height of the picture."""
    height = picture.shape[0]
    small = resized_to_fit(pixels, height)
    padded = np.full((height, height, 3), 128, np.uint8)
    padded[: small.shape[0], : small.shape[1]] = small
    return np.concatenate([padded, picture], axis=1)


def mistakes(predictions: Predictions, images: Split, *, count: int = 24, data: str = ""):
    """The worst predictions, as images, with the prediction, the truth, and the name of the file if there is one.

    single_label: the wrong predictions of the highest probability. multi_label: the images with a wrong label whose
    loss is greatest; + is a label that should not be predicted, - one that is missing. regression: the greatest errors,
    each in standard deviations of its target.

    Raises:
        InputError: there is no wrong prediction.
    """
    chosen, captions, title, pictures = predictions.mistakes(images.class_names, count)
    if images.files:
        names = [os.path.basename(os.fsdecode(images.files[int(index)])) for index in chosen]
        captions = [f"{caption}\n{shorten(name, 22)}" for caption, name in zip(captions, names, strict=True)]
    wide = 1 if pictures is None else 3
    columns = min(8 // wide, len(chosen))
    rows = -(-len(chosen) // columns)
    lines = max(caption.count("\n") for caption in captions)
    figure = new_figure(1.5 * wide * columns, (1.7 + 0.15 * lines) * rows + 0.4)
    axes = panels(figure, len(chosen), columns)
    for place, (each, index, caption) in enumerate(zip(axes, chosen, captions, strict=True)):
        pixels = visible(np.asarray(images[int(index)][0]))
        if pictures is not None:
            pixels = beside(pixels, pictures[place])
        show_image(each, pixels)
        title_of(each, caption)
    figure.suptitle(_titled(title, data), fontsize=9)
    return figure
