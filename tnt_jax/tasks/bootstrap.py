"""95% intervals of metrics that are no proportions: percentiles over bootstrap resamples of the images (Efron 1979).

The resamples are drawn with a fixed seed: the same predictions have the same interval.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tnt_jax.tasks.metrics import Metric

RESAMPLES, FEWEST = 1000, 100
MOST_WORK = 2 * 10**8
"""Fewer resamples are drawn where these times images times outputs would be more."""
CHUNK = 4 * 10**6  # numbers that are held at a time


def resamples(images: int, outputs: int) -> Iterator[Float[np.ndarray, "resamples images"]]:
    """The number of times that each image is in a resample, some resamples at a time."""
    rng = np.random.default_rng(0)
    left = int(np.clip(MOST_WORK // max(images * outputs, 1), FEWEST, RESAMPLES))
    at_a_time = max(1, CHUNK // images)
    while left > 0:
        rows = min(left, at_a_time)
        drawn = rng.integers(0, images, (rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)
        left -= rows


def resamples_within(
    groups: Int[np.ndarray, " cells"], counts: Int[np.ndarray, " cells"], work: int
) -> Iterator[Float[np.ndarray, " cells"]]:
    """The number of times that each cell is drawn, one resample at a time: of each group as many images as it has.

    A resample without any image of a rare class would be a mean over other classes.

    Args:
        work: numbers that a resample takes.
    """
    rng = np.random.default_rng(0)
    of_group = [np.flatnonzero(groups == each) for each in np.unique(groups)]
    for _ in range(int(np.clip(MOST_WORK // max(work, 1) // 10, FEWEST, RESAMPLES))):
        drawn = np.empty(len(counts))
        for places in of_group:
            total = counts[places].sum()
            drawn[places] = rng.multinomial(total, counts[places] / total)
        yield drawn


def intervals(metrics: Sequence[Metric], counted: Iterable[Any], *, mean: bool = False) -> dict[str, tuple]:
    """The 2.5% and 97.5% percentiles of the metrics that have intervals, over the resamples that have a value.

    Args:
        counted: what the functions of the metrics take, of one or several resamples at a time.
        mean: of the mean over the outputs, where a metric has a number for each.
    """
    chosen = [metric for metric in metrics if metric.interval]
    parts = [[np.atleast_1d(metric.function(each)) for metric in chosen] for each in counted]
    found = {}
    for metric, *values in zip(chosen, *parts, strict=True):
        values = np.concatenate(values)
        with np.errstate(all="ignore"):
            low, high = np.nanpercentile(values.mean(axis=1) if mean else values, (2.5, 97.5), axis=0)
        found[metric.name] = low.tolist(), high.tolist()
    return found
