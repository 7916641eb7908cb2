"""95% intervals of metrics that are no shares: percentiles over bootstrap resamples of the images (Efron 1979).

The resamples are drawn with a fixed seed: the same predictions have the same interval.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from tnt_jax.tasks.metrics import class_metrics, ranking, regression_metrics

RESAMPLES, FEWEST = 1000, 100
MOST_WORK = 2 * 10**8
"""Fewer resamples are drawn where these times images times outputs would be more."""
CHUNK = 4 * 10**6  # numbers that are held at a time

Interval = tuple[float, float]


def _resamples(images: int, outputs: int) -> Iterator[Float[np.ndarray, "resamples images"]]:
    """How often each image is in a resample, some resamples at a time."""
    rng = np.random.default_rng(0)
    left = int(np.clip(MOST_WORK // max(images * outputs, 1), FEWEST, RESAMPLES))
    at_a_time = max(1, CHUNK // images)
    while left > 0:
        rows = min(left, at_a_time)
        drawn = rng.integers(0, images, (rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)
        left -= rows


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5% and 97.5% percentiles over the resamples that have a value."""
    with np.errstate(all="ignore"):
        low, high = np.nanpercentile(values, (2.5, 97.5), axis=0)
    return low, high


def _intervals(
    compute: Callable[[np.ndarray], dict[str, np.ndarray]], images: int, outputs: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    parts = [compute(weights) for weights in _resamples(images, outputs)]
    return {name: _ends(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def class_intervals(
    labels: Int[np.ndarray, " images"], predictions: Int[np.ndarray, " images"], classes: int
) -> dict[str, Interval]:
    """Of balanced_accuracy and macro_f1.

    Images are drawn within each class: a resample without any image of a rare class would be a mean over other classes.
    """
    cells, counts = np.unique(labels.astype(np.int64) * classes + predictions, return_counts=True)
    label, prediction = np.divmod(cells, classes)
    rng = np.random.default_rng(0)
    of_class = [np.flatnonzero(label == each) for each in np.unique(label)]

    def draw() -> np.ndarray:
        """How often each cell of the confusion matrix was drawn, (cells,)."""
        drawn = np.empty(len(cells))
        for places in of_class:
            total = counts[places].sum()
            drawn[places] = rng.multinomial(total, counts[places] / total)
        return drawn

    def compute(drawn: np.ndarray) -> dict[str, np.ndarray]:
        right = np.bincount(label, drawn * (label == prediction), classes)
        return class_metrics(right, *(np.bincount(each, drawn, classes) for each in (label, prediction)))

    resamples = int(np.clip(MOST_WORK // max(len(cells) + classes, 1) // 10, FEWEST, RESAMPLES))
    found = [compute(draw()) for _ in range(resamples)]
    return {
        name: _floats(_ends(np.array([each[name] for each in found]))) for name in ("balanced_accuracy", "macro_f1")
    }


def label_intervals(
    labels: Float[np.ndarray, "images labels"],
    logits: Float[np.ndarray, "images labels"],
    predicted: Bool[np.ndarray, "images labels"],
) -> dict[str, Interval]:
    """Of map, roc_auc, macro_f1 and exact_match."""
    truth = labels > 0.5
    right = (truth & predicted).astype(np.float64)
    exact = (truth == predicted).all(axis=1).astype(np.float64)

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        ranked = np.array([ranking(truth[:, label], logits[:, label], weights) for label in range(truth.shape[1])])
        both = weights @ truth.astype(np.float64) + weights @ predicted.astype(np.float64)
        f1 = np.divide(2 * (weights @ right), both, out=np.zeros_like(both), where=both > 0)
        total = weights.sum(axis=1)
        means = _mean_of_known(ranked)
        return {
            "map": means[0],
            "roc_auc": means[1],
            "macro_f1": f1.mean(axis=1),
            "exact_match": weights @ exact / total,
        }

    found = _intervals(compute, *truth.shape)
    return {name: _floats(ends) for name, ends in found.items()}


def _mean_of_known(ranked: Float[np.ndarray, "labels 2 resamples"]) -> Float[np.ndarray, "2 resamples"]:
    """The mean over the labels that a resample has and has not, as `multi_label_metrics` takes it."""
    known = np.isfinite(ranked)
    count = known.sum(axis=0)
    total = np.where(known, ranked, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def value_intervals(
    targets: Float[np.ndarray, "images outputs"], values: Float[np.ndarray, "images outputs"], *, mean: bool
) -> dict[str, tuple]:
    """Of r2, rmse and mae: of each output, or of their means over the outputs."""

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = regression_metrics(targets, values, weights)
        return {name: each.mean(axis=1) if mean else each for name, each in found.items()}

    found = _intervals(compute, *targets.shape)
    return {name: _floats(ends) if mean else ends for name, ends in found.items()}


def _floats(ends: tuple[np.ndarray, np.ndarray]) -> Interval:
    return float(ends[0]), float(ends[1])
