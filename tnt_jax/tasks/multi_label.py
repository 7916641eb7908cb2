"""Any number of labels an image: a sigmoid and binary cross-entropy for each."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tnt_jax.tasks import task
from tnt_jax.tasks.bootstrap import intervals, resamples
from tnt_jax.tasks.calibration import Calibration, best_threshold, calibration_error, sound_temperature
from tnt_jax.tasks.metrics import (
    LOSS,
    Weights,
    computed,
    proportion,
    quotient,
    ranking,
    sigmoid,
    sigmoid_cross_entropy,
    wilson,
    with_intervals,
)
from tnt_jax.tasks.task import Answer, Matrix, Mistakes, Outputs, Predictions, class_name, short

if TYPE_CHECKING:
    import jax


class LabelCounts(NamedTuple):
    """The statistics of predicted labels that metrics need, for each resample."""

    right: Float[np.ndarray, "resamples labels"]
    """The number of images that were rightly given each label."""
    labelled: Float[np.ndarray, "resamples labels"]
    predicted: Float[np.ndarray, "resamples labels"]
    exact: Float[np.ndarray, " resamples"]
    """The proportion of the images without a wrong label."""
    ranked: Float[np.ndarray, "2 resamples"]
    """Average precision and area under the ROC curve: the means over the labels that some images have and others have
    not; NaN where there is none."""


def label_counts(
    truth: Bool[np.ndarray, "images labels"],
    predicted: Bool[np.ndarray, "images labels"],
    logits: Float[np.ndarray, "images labels"],
    weights: Weights | None = None,
) -> LabelCounts:
    """Those of predicted labels. Logits are ranked, because probabilities are all 1 from 37 on."""
    weights = np.ones((1, len(truth))) if weights is None else weights
    sums = [weights @ each.astype(np.float64) for each in (truth & predicted, truth, predicted)]
    exact = weights @ (truth == predicted).all(axis=1).astype(np.float64) / weights.sum(axis=1)
    each = np.array([ranking(truth[:, label], logits[:, label], weights) for label in range(truth.shape[1])])
    known = np.isfinite(each).all(axis=1, keepdims=True)
    total, count = np.where(known, each, 0).sum(axis=0), known.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return LabelCounts(*sums, exact, total / count)


METRICS = (
    proportion("map", lambda n: n.ranked[0], "mAP", interval=True),
    proportion("roc_auc", lambda n: n.ranked[1], "ROC AUC", interval=True),
    proportion("macro_precision", lambda n: quotient(n.right, n.predicted).mean(axis=1)),
    proportion("macro_recall", lambda n: quotient(n.right, n.labelled).mean(axis=1)),
    proportion("macro_f1", lambda n: _f1(*n[:3]).mean(axis=1), "macro F1", interval=True),
    proportion("micro_f1", lambda n: _f1(*(each.sum(axis=1) for each in n[:3])), "micro F1"),
    proportion("exact_match", lambda n: n.exact, interval=True),
    LOSS,
)


def _f1(right: np.ndarray, labelled: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return quotient(2 * right, labelled + predicted)


def label_metrics(
    labels: np.ndarray, logits: np.ndarray, thresholds: float | Float[np.ndarray, " labels"] = 0.5
) -> dict[str, float]:
    """The metrics at the thresholds, which are probabilities."""
    counts = label_counts(labels > 0.5, sigmoid(logits) >= thresholds, logits)
    return {name: float(value[0]) for name, value in computed(METRICS, counts).items()}


@dataclasses.dataclass(frozen=True)
class LabelPredictions(Predictions):
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
        """True where a label was predicted, bool (images, labels)."""
        return self.scores >= self.thresholds

    def metrics(self) -> dict[str, float]:
        """As `Predictions`, with ece."""
        found = with_intervals(label_metrics(self.labels, self.logits, self.thresholds), self.intervals())
        found["ece"] = calibration_error(self.scores.ravel(), self.labels.ravel() > 0.5)
        return {"images": len(self.labels)} | found | self._loss_and_rate()

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% intervals."""
        truth, predicted = self.labels > 0.5, self.predicted
        drawn = resamples(*truth.shape)
        return intervals(METRICS, (label_counts(truth, predicted, self.logits, weights) for weights in drawn))

    def per_output(self, names: Sequence[str]) -> list[dict]:
        rows = []
        for label, name in enumerate(names):
            truth, predicted = self.labels[:, label] > 0.5, self.predicted[:, label]
            (precision,), (area,) = ranking(truth, self.logits[:, label])
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
                    "threshold": float(self.thresholds[label]),
                }
            )
        return rows

    def rows(self, names: Sequence[str]) -> list[dict]:
        def listed(chosen: np.ndarray) -> str:
            return "|".join(name for name, there in zip(names, chosen, strict=True) if there)

        return [
            {"classes": listed(truth > 0.5), "pred_classes": listed(predicted)}
            | {f"score_{name}": float(score) for name, score in zip(names, scores, strict=True)}
            for truth, predicted, scores in zip(self.labels, self.predicted, self.scores, strict=True)
        ]

    def confusion(self, names: Sequence[str]) -> Matrix:
        """Of the images with a label (row) those that were given each label (column): the diagonal is recall, and the
        last row has the images without any label."""
        truth = self.labels > 0.5
        rows = np.concatenate([truth, ~truth.any(axis=1, keepdims=True)], axis=1).astype(np.int64)
        found = label_metrics(self.labels, self.logits, self.thresholds)
        said = f"mAP {METRICS[0].text(found['map'])}, {found['exact_match']:.2%} without a mistake"
        title = f"{len(truth):,} images, {said}"
        return Matrix(rows.T @ self.predicted, rows.sum(axis=0), (*names, "(no label)"), names, title)

    def mistakes(self, names: Sequence[str], count: int) -> Mistakes:
        """The images with a wrong label whose loss is greatest; + is a label that should not be predicted, - one that
        is missing."""
        truth, predicted, scores = self.labels > 0.5, self.predicted, self.scores
        wrong = np.flatnonzero((truth != predicted).any(axis=1))
        if not len(wrong):
            raise task.no_mistakes(len(truth))
        worst = wrong[np.argsort(-self.loss[wrong], kind="stable")][:count]

        def caption(index: int) -> str:
            labels = np.flatnonzero(truth[index] != predicted[index])
            surest = labels[np.argsort(-abs(scores[index, labels] - truth[index, labels]), kind="stable")]
            lines = [
                f"{'-' if truth[index, label] else '+'} {short(names[label])} {scores[index, label]:.0%}"
                for label in surest[:3]
            ]
            return "\n".join([*lines, f"and {len(labels) - 3} more"] if len(labels) > 3 else lines)

        title = (
            f"{len(wrong):,} of {len(truth):,} images have a wrong label (+) or miss one (-); those of the greatest "
            "loss"
        )
        return Mistakes(worst, [caption(index) for index in worst], title)


class MultiLabel(task.Task):
    """Labels are 0 and 1, float32 (images, labels)."""

    name = "multi_label"
    noun = "labels"
    metrics = METRICS
    losses = ("binary_cross_entropy",)
    settings = (*task.MIXING, "data.sampling", "loss.class_weights", "loss.positive_weights", "loss.focal_gamma")
    output_fields = ("thresholds",)
    label_columns = ("label", "labels", "class", "target", "category")
    needs = "0 or 1 for each label of each image"
    wanted = "0 or 1"
    problem_type = "multi_label_classification"

    def is_wrong(self, labels: np.ndarray) -> np.ndarray:
        return (labels != 0) & (labels != 1)

    def usual_columns(self, names: Sequence[str], labels: Any) -> list[str]:
        return [name for name in names if labels.has_marks(name)]

    def labels_of_columns(self, names: Sequence[str], labels: Any) -> tuple:
        return labels.marks(names) if len(names) > 1 else labels.lists(names[0])

    def soft_targets(self, labels: "jax.Array", outputs: int, smoothing: float) -> "jax.Array":
        """Probabilities of the labels; smoothing spreads a share evenly over there and not there."""
        return labels * (1 - smoothing) + smoothing / 2

    def measure(self, logits: "jax.Array", targets: "jax.Array") -> dict[str, "jax.Array"]:
        return {"accuracy": ((logits >= 0) == (targets > 0.5)).mean()}

    def scores_of(self, logits: np.ndarray, labels: np.ndarray, outputs: Outputs) -> dict[str, float]:
        return label_metrics(labels, logits) | {"loss": sigmoid_cross_entropy(logits, labels).mean()}

    def predictions(self, arrays: Sequence[np.ndarray], outputs: Outputs, chosen: Any, rate: float) -> LabelPredictions:
        labels, logits = arrays
        thresholds = np.full(logits.shape[1], 0.5)
        if outputs.thresholds is not None:
            thresholds = np.array(outputs.thresholds)[chosen]
        loss = sigmoid_cross_entropy(logits, labels).mean(axis=1)
        return LabelPredictions(labels, logits.astype(np.float64), loss, thresholds, rate)

    def calibrate(self, logits: np.ndarray, labels: np.ndarray, source: str) -> Calibration:
        truth = labels > 0.5
        temperature = sound_temperature(logits, labels, sigmoid_cross_entropy, (logits > 0) == truth, source)
        probabilities = sigmoid(logits / temperature)
        thresholds = np.array([best_threshold(*each) for each in zip(truth.T, probabilities.T, strict=True)])

        def measured(logits: np.ndarray, thresholds: float | np.ndarray) -> dict[str, float]:
            return {
                "ece": calibration_error(sigmoid(logits).ravel(), truth.ravel()),
                "loss": float(sigmoid_cross_entropy(logits, labels).mean()),
                "macro_f1": label_metrics(labels, logits, thresholds)["macro_f1"],
            }

        before, after = measured(logits, 0.5), measured(logits / temperature, thresholds)
        return Calibration(temperature, thresholds, len(labels), before, after)

    def activated(self, logits: "jax.Array") -> "jax.Array":
        import jax

        return jax.nn.sigmoid(logits)

    def result(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> dict[str, Any]:
        predicted = np.flatnonzero(scores >= np.asarray(outputs.thresholds or 0.5)).tolist()
        classes = [class_name(label, names) for label in predicted]
        return {"pred_labels": predicted, "pred_classes": classes, "pred_scores": scores}

    def answer(self, result: dict[str, Any], names: Sequence[str] | None, count: int) -> Answer:
        found = super().answer(result, names, count)
        rows = [{**row, "predicted": row["label"] in result["pred_labels"]} for row in found.rows]
        return Answer(found.fields | {"top": rows}, rows, {"classes": "|".join(result["pred_classes"])} | found.cells)

    def caption(self, label: np.ndarray, target: np.ndarray, names: Sequence[str]) -> str:
        there = ", ".join(names[index] for index in np.flatnonzero(label > 0.5)) or "none"
        return f"{there}\n{task.likely_targets(target, names, 4)}"

    def meaning(self, outputs: Outputs) -> list[str]:
        shown = ", ".join(f"{value:g}" for value in outputs.thresholds or (0.5,))
        return [f"An image has any number of labels: each output is the logit of one, predicted from {shown} on."]
