"""What outputs are worth, by task: from labels and what a model says of them to numbers by name.

Shares are of 1, errors in the units of the targets. Equal to scikit-learn's where it has them. Plain NumPy, on the
host.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from numpy.typing import ArrayLike

Counts = Num[np.ndarray, "*resamples classes"]
Weights = Num[np.ndarray, "resamples images"]


def class_metrics(right: Counts, labelled: Counts, predicted: Counts) -> dict[str, np.ndarray]:
    """balanced_accuracy, macro_precision, macro_recall and macro_f1, each of shape (*resamples,).

    Balanced accuracy is the mean recall of the classes that images have; the macro means are over these and the classes
    that were predicted, as scikit-learn has them. A precision of nothing is 0.

    Args:
        right, labelled, predicted: for each class how many images were rightly given it, have it, and were given it.
    """
    recall, precision = _over(right, labelled), _over(right, predicted)
    f1 = _over(2 * right, labelled + predicted)
    known = labelled + predicted > 0
    means = {"precision": precision, "recall": recall, "f1": f1}
    balanced = _over(recall.sum(axis=-1), (labelled > 0).sum(axis=-1))
    macro = {f"macro_{name}": _over(each.sum(axis=-1), known.sum(axis=-1)) for name, each in means.items()}
    return {"balanced_accuracy": balanced, **macro}


def _over(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """A quotient, 0 where there is nothing to divide by."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def sigmoid(outputs: np.ndarray) -> np.ndarray:
    """Probabilities of labels, in float64."""
    return np.exp(-np.logaddexp(0, -outputs.astype(np.float64)))


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
    precision = _over(true, true + false)
    area = (more_false * (true - more_true / 2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (more_true * precision).sum(axis=1) / positives, area / (positives * negatives)


def multi_label_metrics(
    labels: Num[np.ndarray, "images labels"],
    logits: Float[np.ndarray, "images labels"],
    thresholds: float | Float[np.ndarray, " labels"] = 0.5,
) -> dict[str, float]:
    """map and roc_auc (means over the labels that some images have and others have not), and at the thresholds
    macro_precision, macro_recall, macro_f1, micro_f1 (means over all labels, or of all decisions) and exact_match.

    Logits are ranked, because probabilities are all 1 from 37 on; thresholds are probabilities.

    map and roc_auc are NaN where no label is of that kind.
    """
    truth, predicted = labels > 0.5, sigmoid(logits) >= thresholds
    found = [ranking(truth[:, label], logits[:, label]) for label in range(truth.shape[1])]
    ranked = np.array([[float(each[0]) for each in pair] for pair in found])
    ranked = ranked[np.isfinite(ranked).all(axis=1)]
    precision, area = ranked.mean(axis=0) if len(ranked) else (np.nan, np.nan)
    right, labelled, positive = (truth & predicted).sum(0), truth.sum(0), predicted.sum(0)
    means = {
        "macro_precision": _over(right, positive).mean(),
        "macro_recall": _over(right, labelled).mean(),
        "macro_f1": _over(2 * right, labelled + positive).mean(),
        "micro_f1": _over(2 * right.sum(), labelled.sum() + positive.sum()),
        "exact_match": (truth == predicted).all(axis=1).mean(),
    }
    return {"map": float(precision), "roc_auc": float(area)} | {name: float(value) for name, value in means.items()}


def regression_metrics(
    targets: Float[np.ndarray, "images outputs"],
    values: Float[np.ndarray, "images outputs"],
    weights: Weights | None = None,
) -> dict[str, Float[np.ndarray, "resamples outputs"]]:
    """r2, rmse and mae of each output. R2 is NaN where a target has one value alone.

    Args:
        weights: as in `ranking`.
    """
    targets, values = targets.astype(np.float64), values.astype(np.float64)
    weights = np.ones((1, len(targets))) if weights is None else weights
    total = weights.sum(axis=1, keepdims=True)
    errors, centred = values - targets, targets - targets.mean(axis=0)
    square, spread = weights @ errors**2 / total, weights @ centred**2 / total
    variance = spread - (weights @ centred / total) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        # Of one value alone the difference is what rounding leaves.
        r2 = np.where(variance > 1e-12 * spread, 1 - square / variance, np.nan)
    return {"r2": r2, "rmse": np.sqrt(square), "mae": weights @ np.abs(errors) / total}


def mean_of_defined(values: Float[np.ndarray, "*any"]) -> float:
    """Mean of the numbers that are not NaN; NaN where all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def confusion_counts(
    labels: Int[np.ndarray, " images"], predictions: Int[np.ndarray, " images"], classes: int
) -> tuple[Int[np.ndarray, " classes"], Int[np.ndarray, " classes"], Int[np.ndarray, " classes"]]:
    """For each class how many images were rightly given it, have it, and were given it."""
    right = labels[labels == predictions]
    return tuple(np.bincount(each, minlength=classes) for each in (right, labels, predictions))


TITLES = {
    "top1": "top-1", "top5": "top-5", "ece": "ECE", "map": "mAP", "ap": "AP", "roc_auc": "ROC AUC", "f1": "F1",
    "macro_f1": "macro F1", "micro_f1": "micro F1", "r2": "R2", "rmse": "RMSE", "mae": "MAE",
    "images_per_second": "images/s",
}  # fmt: skip
"""What people call a metric; what is not here is called by its name, with spaces."""
SHARES = (
    "top",
    "map",
    "ap",
    "roc",
    "macro",
    "micro",
    "balanced",
    "exact",
    "precision",
    "recall",
    "f1",
    "accuracy",
    "ece",
)
"""Metrics whose names begin so are printed in percent."""


def title_of(name: str) -> str:
    """What people call a metric."""
    return TITLES.get(name, name.replace("_", " "))


def spoken(name: str) -> str:
    """A metric in a sentence: top-1 is called accuracy."""
    return "accuracy" if name == "top1" else title_of(name)


def printed(name: str, value: float | None) -> str:
    """A value of a metric for people: shares in percent, with the sign; "-" where it is undefined."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.2%}" if name.startswith(SHARES) else f"{value:.4g}"
