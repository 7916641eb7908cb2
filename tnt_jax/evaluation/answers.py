"""A model's answers for a number of images, by task, and what they are worth: metrics, their uncertainty, classes."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from tnt_jax.evaluation.bootstrap import label_intervals, value_intervals
from tnt_jax.evaluation.scores import Answers, calibration_error, metrics_of_classes, per_class, wilson
from tnt_jax.training.metrics import multi_label_metrics, ranking, regression_metrics


@dataclasses.dataclass(frozen=True)
class LabelAnswers:
    """A model's answers for images with any number of labels. Labels are those of the data."""

    labels: Float[np.ndarray, "images labels"]
    """0 or 1."""
    scores: Float[np.ndarray, "images labels"]
    """Their probabilities."""
    loss: Float[np.ndarray, " images"]
    """Binary cross-entropy in nats, the mean over the labels."""
    thresholds: Float[np.ndarray, " labels"]
    """The probability from which on a label is answered."""
    images_per_second: float

    @property
    def answered(self) -> np.ndarray:
        """Whether each label was answered, bool (images, labels)."""
        return self.scores >= self.thresholds


@dataclasses.dataclass(frozen=True)
class ValueAnswers:
    """A model's answers for images with numbers, in the units of the targets."""

    targets: Float[np.ndarray, "images outputs"]
    values: Float[np.ndarray, "images outputs"]
    loss: Float[np.ndarray, " images"]
    """Squared error of the standardised targets, the mean over the outputs."""
    images_per_second: float


AnyAnswers = Answers | LabelAnswers | ValueAnswers


@functools.singledispatch
def metrics_of(answers: AnyAnswers) -> dict[str, float]:
    """images, the metrics of the task, of some the ends of their 95% intervals, loss (mean), images_per_second."""
    return metrics_of_classes(answers)


@metrics_of.register
def _(answers: LabelAnswers) -> dict[str, float]:
    metrics = multi_label_metrics(answers.labels, answers.scores, answers.thresholds)
    intervals = label_intervals(answers.labels, answers.scores, answers.thresholds)
    decisions = answers.scores.ravel(), answers.labels.ravel() > 0.5
    found = _with_intervals(metrics, intervals) | {"ece": calibration_error(*decisions)}
    return {"images": len(answers.labels)} | found | _loss_and_rate(answers)


@metrics_of.register
def _(answers: ValueAnswers) -> dict[str, float]:
    metrics = {name: float(each.mean()) for name, each in regression_metrics(answers.targets, answers.values).items()}
    found = _with_intervals(metrics, value_intervals(answers.targets, answers.values, mean=True))
    return {"images": len(answers.targets)} | found | _loss_and_rate(answers)


def _with_intervals(metrics: dict, intervals: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Each metric, followed by the ends of its interval where it has one."""
    found = {}
    for name, value in metrics.items():
        found[name] = value
        if name in intervals:
            found[f"{name}_low"], found[f"{name}_high"] = intervals[name]
    return found


def _loss_and_rate(answers: AnyAnswers) -> dict[str, float]:
    return {"loss": float(answers.loss.mean()), "images_per_second": answers.images_per_second}


@functools.singledispatch
def per_output(answers: AnyAnswers, names: Sequence[str]) -> list[dict]:
    """A row for each class that has images, for each label, or for each target of a regression."""
    return per_class(answers, names)


@per_output.register
def _(answers: LabelAnswers, names: Sequence[str]) -> list[dict]:
    rows = []
    for label, name in enumerate(names):
        truth, answered = answers.labels[:, label] > 0.5, answers.answered[:, label]
        (precision,), (area,) = ranking(truth, answers.scores[:, label])
        right, images, positive = int((truth & answered).sum()), int(truth.sum()), int(answered.sum())
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
                "threshold": float(answers.thresholds[label]),
            }
        )
    return rows


@per_output.register
def _(answers: ValueAnswers, names: Sequence[str]) -> list[dict]:
    metrics = {name: each[0] for name, each in regression_metrics(answers.targets, answers.values).items()}
    intervals = value_intervals(answers.targets, answers.values, mean=False)
    rows = []
    for output, name in enumerate(names):
        own = {metric: float(each[output]) for metric, each in metrics.items()}
        ends = {metric: (low[output], high[output]) for metric, (low, high) in intervals.items()}
        rows.append({"target": name, "images": len(answers.targets)} | _with_intervals(own, ends))
    return rows
