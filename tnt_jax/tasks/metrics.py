"""The `Metric`, and the mathematics that tasks share, in NumPy, on the host.

Values are scikit-learn's where it has them. Many resamples are computed at once, for which it has no function.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num
from numpy.typing import ArrayLike

Weights = Num[np.ndarray, "resamples images"]
Z95 = 1.959963984540054  # of the normal distribution: what 95% of it lie within


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that says how good predictions are. Proportions are of 1, errors in the units of the targets."""

    name: str
    title: str = ""
    """Its name for people; by default its name, with spaces."""
    proportion: bool = False
    """It is printed in percent."""
    lower_is_better: bool = False
    function: Callable[[Any], np.ndarray] | None = None
    """From what its task counts of predictions to a number for each resample; None where the task has it already."""
    interval: bool = False
    """It has a 95% interval, by bootstrap."""
    of_batch: str = ""
    """The metric of training batches that is like it."""

    def __post_init__(self):
        object.__setattr__(self, "title", self.title or self.name.replace("_", " "))

    @property
    def in_words(self) -> str:
        """Its title in a sentence: top-1 is called accuracy."""
        return self.title if self.of_batch in ("", self.name) else self.of_batch

    def text(self, value: float | None) -> str:
        """A value for people: proportions in percent, with the sign; "-" where it is undefined."""
        if value is None or math.isnan(value):
            return "-"
        return f"{value:.2%}" if self.proportion else f"{value:.4g}"


def proportion(name: str, function: Callable | None = None, title: str = "", **options) -> Metric:
    """A metric that is a proportion."""
    return Metric(name, title, proportion=True, function=function, **options)


LOSS = Metric("loss", lower_is_better=True)
OTHERS = (
    *map(proportion, ("accuracy", "precision", "recall")),
    *(proportion(title.lower(), title=title) for title in ("ECE", "AP", "F1", "IoU")),
    Metric("images_per_second", "images/s"),
)
"""The columns that are printed beside the metrics of a task."""


def computed(metrics: Sequence[Metric], counted: Any) -> dict[str, np.ndarray]:
    """The metrics that have a function."""
    return {metric.name: metric.function(counted) for metric in metrics if metric.function}


def with_intervals(values: dict[str, float], intervals: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Each value, followed by the ends of its interval where it has one."""
    found = {}
    for name, value in values.items():
        found[name] = value
        if name in intervals:
            found[f"{name}_low"], found[f"{name}_high"] = intervals[name]
    return found


def quotient(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """0 where there is nothing to divide by."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def mean_of_defined(values: Float[np.ndarray, "*any"]) -> float:
    """Mean of the numbers that are not NaN; NaN where all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of labels, in float64."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def sigmoid_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each label, in nats, in float64."""
    return np.logaddexp(0, logits.astype(np.float64)) - labels * logits


def ranking(
    truth: Bool[np.ndarray, " images"], scores: Float[np.ndarray, " images"], weights: Weights | None = None
) -> tuple[Float[np.ndarray, " resamples"], Float[np.ndarray, " resamples"]]:
    """Average precision and the area under the ROC curve of one label; NaN where it is true of all images or of none.

    Equal scores count as one threshold, as in scikit-learn.

    Args:
        weights: how often each image counts, once for each row; by default one row in which each counts once.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    weights = np.ones((1, len(scores))) if weights is None else weights
    weights, truth = weights[:, order], truth[order]
    true = np.cumsum(weights * truth, axis=1, dtype=np.float64)[:, ends]
    false = np.cumsum(weights * ~truth, axis=1, dtype=np.float64)[:, ends]
    positives, negatives = true[:, -1], false[:, -1]
    more_true, more_false = (np.diff(each, axis=1, prepend=0) for each in (true, false))
    precision = quotient(true, true + false)
    area = (more_false * (true - more_true / 2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (more_true * precision).sum(axis=1) / positives, area / (positives * negatives)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% confidence interval of a proportion of right predictions, `right` of `count` (Wilson 1927).

    Unlike the interval of the normal approximation it holds for few images and for proportions near 0 and 1.
    """
    if count == 0:
        return 0.0, 1.0
    share = right / count
    middle = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    # Rounding leaves a proportion of none a hair below 0, which is printed as -0.00.
    return max(0.0, (middle - half) / (1 + Z95**2 / count)), min(1.0, (middle + half) / (1 + Z95**2 / count))
