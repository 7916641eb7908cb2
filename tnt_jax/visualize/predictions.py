"""Where a model errs, by its task: confusion and mistakes. Each returns a matplotlib figure."""

from collections.abc import Sequence

import numpy as np

from tnt_jax.config import InputError
from tnt_jax.data.samples import visible
from tnt_jax.data.sources import Split
from tnt_jax.evaluation.predictions import AnyPredictions, LabelPredictions, ValuePredictions
from tnt_jax.evaluation.scores import Predictions, confusion_matrix
from tnt_jax.tasks.metrics import multi_label_metrics, printed, regression_metrics
from tnt_jax.visualize.canvas import new_figure, panels, shorten, show_image, title_of

MOST_NUMBERS = 20
"""Up to so many classes every cell of a matrix has its number."""


def confusion(predictions: AnyPredictions, class_names: Sequence[str], *, data: str = ""):
    """The classes that images were taken for.

    single_label: rows are the true classes, columns the predicted ones, in percent of a row; classes without images
    have an empty row. multi_label: of the images with a label (row), the percentage that was given each label (column);
    the diagonal is recall, and the last row has the images without any label. regression: each prediction over its
    target.

    Args:
        data: what the title says of the images, such as their source and split.
    """
    if isinstance(predictions, ValuePredictions):
        return _scatter(predictions, class_names, data)
    if isinstance(predictions, LabelPredictions):
        return _of_labels(predictions, class_names, data)
    counts = confusion_matrix(predictions, len(class_names))
    title = f"{len(predictions.labels):,} images, {predictions.right(1).mean():.2%} right"
    return _matrix(counts, counts.sum(axis=1), class_names, class_names, _titled(title, data))


def _titled(title: str, data: str) -> str:
    return f"{shorten(data)}: {title}" if data else title


def _of_labels(predictions: LabelPredictions, class_names: Sequence[str], data: str):
    truth, predicted = predictions.labels > 0.5, predictions.predicted
    rows = np.concatenate([truth, ~truth.any(axis=1, keepdims=True)], axis=1).astype(np.int64)
    metrics = multi_label_metrics(predictions.labels, predictions.logits, predictions.thresholds)
    title = (
        f"{len(truth):,} images, mAP {printed('map', metrics['map'])}, {metrics['exact_match']:.2%} without a mistake"
    )
    return _matrix(
        rows.T @ predicted, rows.sum(axis=0), (*class_names, "(no label)"), class_names, _titled(title, data)
    )


def _matrix(counts: np.ndarray, totals: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str):
    shares = 100 * counts / np.maximum(totals, 1)[:, None]
    few = len(columns) <= MOST_NUMBERS
    rows, columns = (list(map(shorten, names)) for names in (rows, columns))
    of_names = 0.08 * max(map(len, rows)) if few else 0  # inches beside and below the matrix
    side = 2.5 + 0.5 * len(columns) if few else 8
    figure = new_figure(max(side + 0.8 + of_names, 0.085 * len(title)), side + of_names)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(drawn, label="% of the images of the class", shrink=0.8)
    axes.set_xlabel("prediction")
    axes.set_ylabel("right class")
    if few:
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "black" if shares[row, column] > 55 else "white"
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(title, fontsize=10)
    return figure


MOST_POINTS = 5000


def _scatter(predictions: ValuePredictions, names: Sequence[str], data: str):
    """A panel for each target; of many images 5,000, evenly spread."""
    metrics = regression_metrics(predictions.targets, predictions.values)
    drawn = np.unique(np.linspace(0, len(predictions.targets) - 1, MOST_POINTS).astype(int))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(3.4 * columns, 3.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for output, (axes, name) in enumerate(zip(grid, names, strict=False)):
        target, value = predictions.targets[drawn, output], predictions.values[drawn, output]
        ends = [min(target.min(), value.min()), max(target.max(), value.max())]
        axes.plot(ends, ends, color="#717581", linewidth=1)
        axes.scatter(target, value, s=6, color="#3f90da", alpha=0.5, linewidths=0)
        axes.set_xlabel(f"{name}, target")
        axes.set_ylabel("prediction")
        axes.set_title(f"R2 {metrics['r2'][0, output]:.4f}, MAE {metrics['mae'][0, output]:.4g}", fontsize=9)
    if data:
        figure.suptitle(data, fontsize=9)
    return figure


def mistakes(predictions: AnyPredictions, images: Split, *, count: int = 24, data: str = ""):
    """The worst predictions, as images, with the prediction and the truth.

    single_label: the wrong predictions of the highest probability. multi_label: the images with a wrong label whose
    loss is greatest; + is a label that should not be predicted, - one that is missing. regression: the greatest errors,
    each in standard deviations of its target.

    Raises:
        InputError: there is no wrong prediction.
    """
    chosen, captions, title = {LabelPredictions: _wrong_labels, ValuePredictions: _wrong_values}.get(
        type(predictions), _wrong_classes
    )(predictions, images.class_names, count)
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    lines = max(caption.count("\n") for caption in captions)
    figure = new_figure(1.5 * columns, (1.7 + 0.15 * lines) * rows + 0.4)
    for axes, index, caption in zip(panels(figure, len(chosen), columns), chosen, captions, strict=True):
        show_image(axes, visible(np.asarray(images[int(index)][0])))
        title_of(axes, caption)
    figure.suptitle(_titled(title, data), fontsize=9)
    return figure


def _no_mistakes(count: int) -> InputError:
    return InputError(f"there are no mistakes: all {count} predictions are right")


Mistakes = tuple[np.ndarray, list[str], str]
"""Numbers of the images, a caption of each, and the title."""


def _wrong_classes(predictions: Predictions, names: Sequence[str], count: int) -> Mistakes:
    wrong = np.flatnonzero(~predictions.right(1))
    if not len(wrong):
        raise _no_mistakes(len(predictions.labels))
    surest = wrong[np.argsort(-predictions.scores[wrong, 0], kind="stable")][:count]
    captions = [
        f"{_short(names[predictions.top[index, 0]])} {predictions.scores[index, 0]:.0%}\n"
        f"is {_short(names[predictions.labels[index]])}"
        for index in surest
    ]
    title = f"{len(wrong):,} of {len(predictions.labels):,} predictions are wrong; those that the model was surest of"
    return surest, captions, title


def _wrong_labels(predictions: LabelPredictions, names: Sequence[str], count: int) -> Mistakes:
    truth, predicted = predictions.labels > 0.5, predictions.predicted
    wrong = np.flatnonzero((truth != predicted).any(axis=1))
    if not len(wrong):
        raise _no_mistakes(len(truth))
    worst = wrong[np.argsort(-predictions.loss[wrong], kind="stable")][:count]

    def caption(index: int) -> str:
        labels = np.flatnonzero(truth[index] != predicted[index])
        surest = labels[np.argsort(-abs(predictions.scores[index, labels] - truth[index, labels]), kind="stable")]
        lines = [
            f"{'-' if truth[index, label] else '+'} {_short(names[label])} {predictions.scores[index, label]:.0%}"
            for label in surest[:3]
        ]
        return "\n".join([*lines, f"and {len(labels) - 3} more"] if len(labels) > 3 else lines)

    title = (
        f"{len(wrong):,} of {len(truth):,} images have a wrong label (+) or miss one (-); those of the greatest loss"
    )
    return worst, [caption(index) for index in worst], title


def _wrong_values(predictions: ValuePredictions, names: Sequence[str], count: int) -> Mistakes:
    spread = predictions.targets.std(axis=0)
    errors = np.abs(predictions.values - predictions.targets) / np.where(spread > 0, spread, 1)
    worst = np.argsort(-errors.max(axis=1), kind="stable")[:count]
    captions = []
    for index in worst:
        output = int(errors[index].argmax())
        value, target = predictions.values[index, output], predictions.targets[index, output]
        captions.append(f"{_short(names[output])} {value:.4g}\nis {target:.4g}")
    return worst, captions, f"{len(errors):,} images; those of the greatest error, in standard deviations of the target"


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
