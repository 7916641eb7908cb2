"""A model's predictions for a number of images, by task, and their metrics: with uncertainty, and by class."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from tnt_jax.evaluation.scores import Predictions, calibration_error, metrics_of_classes, per_class, wilson
from tnt_jax.tasks.bootstrap import label_intervals, value_intervals
from tnt_jax.tasks.metrics import mean_of_defined, multi_label_metrics, ranking, regression_metrics, sigmoid


@dataclasses.dataclass(frozen=True)
class LabelPredictions:
    """A model's predictions for images with any number of labels. Labels are those of the data."""

    labels: Float[np.ndarray, "images labels"]
    """0 or 1."""
    logits: Float[np.ndarray, "images labels"]
    loss: Float[np.ndarray, " images"]
    """Binary cross-entropy in nats, the mean over the labels."""
    thresholds: Float[np.ndarray, " labels"]
    """The probability from which on a label is predicted."""
    images_per_second: float

    @property
    def scores(self) -> np.ndarray:
        """The probabilities of the labels, float64 (images, labels)."""
        return sigmoid(self.logits)

    @property
    def predicted(self) -> np.ndarray:
        """Whether each label was predicted, bool (images, labels)."""
        return self.scores >= self.thresholds


@dataclasses.dataclass(frozen=True)
class ValuePredictions:
    """A model's predictions for images with numbers, in the units of the targets."""

    targets: Float[np.ndarray, "images outputs"]
    values: Float[np.ndarray, "images outputs"]
    loss: Float[np.ndarray, " images"]
    """Squared error of the standardised targets, the mean over the outputs."""
    images_per_second: float


AnyPredictions = Predictions | LabelPredictions | ValuePredictions


@functools.singledispatch
def metrics_of(predictions: AnyPredictions) -> dict[str, float]:
    """images, the metrics of the task, of some the ends of their 95% intervals, loss (mean), images_per_second."""
    return metrics_of_classes(predictions)


@metrics_of.register
def _(predictions: LabelPredictions) -> dict[str, float]:
    metrics = multi_label_metrics(predictions.labels, predictions.logits, predictions.thresholds)
    intervals = label_intervals(predictions.labels, predictions.logits, predictions.predicted)
    decisions = predictions.scores.ravel(), predictions.labels.ravel() > 0.5
    found = _with_intervals(metrics, intervals) | {"ece": calibration_error(*decisions)}
    return {"images": len(predictions.labels)} | found | _loss_and_rate(predictions)


@metrics_of.register
def _(predictions: ValuePredictions) -> dict[str, float]:
    found = regression_metrics(predictions.targets, predictions.values)
    metrics = {name: mean_of_defined(each) for name, each in found.items()}
    found = _with_intervals(metrics, value_intervals(predictions.targets, predictions.values, mean=True))
    return {"images": len(predictions.targets)} | found | _loss_and_rate(predictions)


def _with_intervals(metrics: dict, intervals: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Each metric, followed by the ends of its interval where it has one."""
    found = {}
    for name, value in metrics.items():
        found[name] = value
        if name in intervals:
            found[f"{name}_low"], found[f"{name}_high"] = intervals[name]
    return found


def _loss_and_rate(predictions: AnyPredictions) -> dict[str, float]:
    return {"loss": float(predictions.loss.mean()), "images_per_second": predictions.images_per_second}


@functools.singledispatch
def per_output(predictions: AnyPredictions, names: Sequence[str]) -> list[dict]:
    """A row for each class that has images, for each label, or for each target of a regression."""
    return per_class(predictions, names)


@per_output.register
def _(predictions: LabelPredictions, names: Sequence[str]) -> list[dict]:
    rows = []
    for label, name in enumerate(names):
        truth, predicted = predictions.labels[:, label] > 0.5, predictions.predicted[:, label]
        (precision,), (area,) = ranking(truth, predictions.logits[:, label])
        right, images, positive = int((truth & predicted).sum()), int(truth.sum()), int(predicted.sum())
        low, high = wilson(right, images)
        rows.append(
            {
                "class": name,
                "images": images,
                "ap": float(precision) if images else None,
                "roc_auc": float(area) if 0 < images < len(truth) else None,
                "recall": right / images if images else None,
                "recall_low": low,
                "recall_high": high,
                "precision": right / positive if positive else None,
                "f1": 2 * right / (images + positive) if images + positive else None,
                "threshold": float(predictions.thresholds[label]),
            }
        )
    return rows


@per_output.register
def _(predictions: ValuePredictions, names: Sequence[str]) -> list[dict]:
    metrics = {name: each[0] for name, each in regression_metrics(predictions.targets, predictions.values).items()}
    intervals = value_intervals(predictions.targets, predictions.values, mean=False)
    rows = []
    for output, name in enumerate(names):
        own = {metric: float(each[output]) for metric, each in metrics.items()}
        ends = {metric: (low[output], high[output]) for metric, (low, high) in intervals.items()}
        rows.append({"target": name, "images": len(predictions.targets)} | _with_intervals(own, ends))
    return rows
