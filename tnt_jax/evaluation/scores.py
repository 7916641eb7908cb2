"""Metrics of predicted classes: shares with their uncertainty, calibration, classes. Plain NumPy, on the host."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from tnt_jax.tasks.bootstrap import class_intervals
from tnt_jax.tasks.metrics import class_metrics, confusion_counts, ranking

Z95 = 1.959963984540054  # of the normal distribution: what 95% of it lie within


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's predictions for a number of images. Classes are those of the model."""

    labels: Int[np.ndarray, " images"]
    """The right classes."""
    top: Int[np.ndarray, "images k"]
    """The likeliest classes, up to five, the likeliest first."""
    scores: Float[np.ndarray, "images k"]
    """Their probabilities."""
    loss: Float[np.ndarray, " images"]
    """Cross-entropy in nats."""
    images_per_second: float
    """NaN where one batch was all there was: the first is compiled, and says nothing of the rate."""

    accepted: Sequence[frozenset[int]] | None = None
    """Where an image has several right predictions: all of them. The others stand in `labels`."""

    def right(self, k: int) -> np.ndarray:
        """Whether a right class is among the k likeliest, bool (images,)."""
        if self.accepted is None:
            return (self.top[:, :k] == self.labels[:, None]).any(axis=1)
        return np.array(
            [
                not accepted.isdisjoint(top)
                for accepted, top in zip(self.accepted, self.top[:, :k].tolist(), strict=True)
            ]
        )

    def rescored(self, accepted: Sequence[frozenset[int]]) -> "Predictions":
        """The same predictions with other right ones. Images that have none are left out, and there is no loss."""
        kept = [index for index, classes in enumerate(accepted) if classes]
        return Predictions(
            self.labels[kept],
            self.top[kept],
            self.scores[kept],
            np.full(len(kept), np.nan),
            self.images_per_second,
            [accepted[index] for index in kept],
        )


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of right predictions, `right` of `count` (Wilson 1927).

    Unlike the interval of the normal approximation it holds for few images and for shares near 0 and 1.
    """
    if count == 0:
        return 0.0, 1.0
    share = right / count
    middle = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return (middle - half) / (1 + Z95**2 / count), (middle + half) / (1 + Z95**2 / count)


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, on average over the images.

    Images are put into equal bins of confidence. Source: Guo et al., arXiv 1706.04599, with their 15 bins.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    gaps = np.abs(np.bincount(place, right, bins) - np.bincount(place, confidence, bins))
    return float(gaps.sum() / counts.sum())


def metrics_of_classes(predictions: Predictions) -> dict[str, float]:
    """images, top1 and top5 (shares), balanced_accuracy and macro_f1 with the ends of their 95% intervals, roc_auc
    where there are two classes, ece, loss (mean), images_per_second.
    """
    count = len(predictions.labels)
    scores: dict[str, float] = {"images": count}
    for k in (1, 5):
        right = int(predictions.right(k).sum())
        low, high = wilson(right, count)
        scores |= {f"top{k}": right / count, f"top{k}_low": low, f"top{k}_high": high}
    if predictions.accepted is None:
        scores |= _of_classes(predictions)
    scores["ece"] = calibration_error(predictions.scores[:, 0], predictions.right(1))
    return scores | {"loss": float(predictions.loss.mean()), "images_per_second": predictions.images_per_second}


def _of_classes(predictions: Predictions) -> dict[str, float]:
    """What a classifier of one class is worth where classes differ in how many images they have."""
    classes = 1 + int(max(predictions.labels.max(), predictions.top.max()))
    metrics = class_metrics(*confusion_counts(predictions.labels, predictions.top[:, 0], classes))
    intervals = class_intervals(predictions.labels, predictions.top[:, 0], classes)
    found = {}
    for name in ("balanced_accuracy", "macro_precision", "macro_recall", "macro_f1"):
        found[name] = float(metrics[name])
        if name in intervals:
            found[f"{name}_low"], found[f"{name}_high"] = intervals[name]
    if predictions.top.shape[1] == 2 and classes == 2:
        second = np.where(predictions.top[:, 0] == 1, predictions.scores[:, 0], predictions.scores[:, 1])
        (area,) = ranking(predictions.labels == 1, second)[1]
        found["roc_auc"] = float(area)
    return found


def per_class(predictions: Predictions, class_names: Sequence[str]) -> list[dict]:
    """For each class that has images: how many, how many were found (recall) with its interval, precision and F1.

    Precision is None where the class was never the prediction.
    """
    rows, predicted = [], np.bincount(predictions.top[:, 0], minlength=len(class_names))
    for label in np.unique(predictions.labels):
        of_class = predictions.labels == label
        right = int(predictions.right(1)[of_class].sum())
        low, high = wilson(right, int(of_class.sum()))
        rows.append(
            {
                "class": class_names[label],
                "images": int(of_class.sum()),
                "recall": right / int(of_class.sum()),
                "recall_low": low,
                "recall_high": high,
                "precision": right / int(predicted[label]) if predicted[label] else None,
                "f1": 2 * right / int(of_class.sum() + predicted[label]),
            }
        )
    return rows


def confusion_matrix(predictions: Predictions, classes: int) -> Int[np.ndarray, "classes classes"]:
    """How often an image of a class (row) was given a class (column)."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (predictions.labels, predictions.top[:, 0]), 1)
    return matrix
