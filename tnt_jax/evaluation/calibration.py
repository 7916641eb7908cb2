"""Temperature scaling and label thresholds, from images that were neither trained on nor are reported."""

import dataclasses
import os

import numpy as np
from jaxtyping import Bool, Float, Num

from tnt_jax.config import DataConfig, InputError, Task
from tnt_jax.data.opening import open_reported, open_split
from tnt_jax.data.sources import NoSplitError, Split
from tnt_jax.evaluation.evaluate import outputs_of
from tnt_jax.evaluation.scores import calibration_error
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import description_of
from tnt_jax.tasks.metrics import multi_label_metrics, sigmoid

MAX_TEMPERATURE = 20


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The temperature and thresholds, and metrics before and after."""

    temperature: float
    """What logits are divided by."""
    thresholds: Float[np.ndarray, " labels"] | None
    """multi_label: the probability from which on each label is predicted."""
    images: int
    before: dict[str, float]
    """ece and loss, and of labels macro_f1, on the images that it was fitted to."""
    after: dict[str, float]


def calibrate(model: Model, images: Split, data: DataConfig, *, batch_size: int = 64) -> Calibration:
    """The temperature of a model, and its thresholds, for the images of a split that it was not trained on.

    The temperature is the one number that makes the cross-entropy of softmax(logits / temperature) least, or of the
    sigmoids: Guo et al., arXiv 1706.04599. It changes no order of predictions. The threshold of a label is that of its
    highest F1.

    Raises:
        InputError: the model is a regression, the images are of another task or classes, or no temperature is best: all
            are predicted right, or it lies at the end of the range that is searched.
    """
    task = description_of(model).outputs.task
    if task == "regression":
        raise InputError("the model is a regression: it has no probabilities to calibrate")
    labels, (logits,), _ = outputs_of([model], images, data, batch_size=batch_size)
    logits = logits.astype(np.float64)
    _check_mistakes(logits, labels, task, data.source)
    temperature = fit_temperature(logits, labels, task)
    if not max(temperature, 1 / temperature) * 1.001 < MAX_TEMPERATURE:
        raise InputError(
            f"the least loss on the {len(labels)} images of {data.source} lies at the bound of temperatures, "
            f"{temperature:.3g}: they do not say how sure the model should be; calibrate on other images, or on more"
        )
    if task == "single_label":
        before, after = (_of_classes(each, labels) for each in (logits, logits / temperature))
        return Calibration(temperature, None, len(labels), before, after)
    probabilities, truth = sigmoid(logits / temperature), labels > 0.5
    thresholds = np.array([best_threshold(*each) for each in zip(truth.T, probabilities.T, strict=True)])
    return Calibration(
        temperature,
        thresholds,
        len(labels),
        _of_labels(logits, labels, 0.5),
        _of_labels(logits / temperature, labels, thresholds),
    )


def _check_mistakes(logits: np.ndarray, labels: np.ndarray, task: Task, source: str) -> None:
    """Without a mistake the loss falls with the temperature for ever, and probabilities become 100% of anything."""
    right = logits.argmax(axis=1) == labels if task == "single_label" else (logits > 0) == (labels > 0.5)
    if right.all():
        raise InputError(
            f"all {len(labels)} images of {source} are predicted without a mistake: no temperature is best, since the "
            "loss falls to 0 with it; calibrate on other images, or on more"
        )


def fit_temperature(
    logits: Float[np.ndarray, "images outputs"], labels: Num[np.ndarray, "images ..."], task: Task
) -> float:
    """The temperature of the least cross-entropy, between 1 / MAX_TEMPERATURE and MAX_TEMPERATURE."""
    from scipy.optimize import minimize_scalar

    loss = _cross_entropy if task == "single_label" else _binary_cross_entropy
    found = minimize_scalar(
        lambda log: loss(logits / np.exp(log), labels).mean(),
        bounds=(-np.log(MAX_TEMPERATURE), np.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]


def _binary_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, logits) - labels * logits


def best_threshold(truth: Bool[np.ndarray, " images"], probabilities: Float[np.ndarray, " images"]) -> float:
    """The probability from which on a label is predicted so that its F1 is highest; 0.5 where no image has the label.

    It lies in the middle between the last probability that is predicted and the next.
    """
    if not truth.any():
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    scores = probabilities[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    right = np.cumsum(truth[order])[ends]
    best = ends[np.argmax(2 * right / (ends + 1 + truth.sum()))]
    following = scores[best + 1] if best + 1 < len(scores) else 0.0
    return float((scores[best] + following) / 2)


def _of_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    right = probabilities.argmax(axis=1) == labels
    return {
        "ece": calibration_error(probabilities.max(axis=1), right),
        "loss": float(_cross_entropy(logits, labels).mean()),
    }


def _of_labels(logits: np.ndarray, labels: np.ndarray, thresholds: float | np.ndarray) -> dict[str, float]:
    return {
        "ece": calibration_error(sigmoid(logits).ravel(), labels.ravel() > 0.5),
        "loss": float(_binary_cross_entropy(logits, labels).mean()),
        "macro_f1": multi_label_metrics(labels, logits, thresholds)["macro_f1"],
    }


def calibrated(model: Model, found: Calibration, source: dict) -> Model:
    """The same model with its head divided by the temperature, and with the thresholds.

    Whatever reads the model then has calibrated logits: predictions, exports, timm.

    Args:
        source: what is noted of where the numbers come from.
    """
    from flax import nnx

    changed = nnx.clone(model)
    for parameter in (changed.head.kernel, changed.head.bias):
        parameter[...] = (parameter[...] / found.temperature).astype(parameter[...].dtype)
    described = description_of(model)
    thresholds = None if found.thresholds is None else tuple(found.thresholds.tolist())
    changed.description = dataclasses.replace(
        described,
        outputs=dataclasses.replace(described.outputs, thresholds=thresholds),
        source={**(described.source or {}), "temperature": found.temperature, **source},
        checksums=None,
    )
    return changed


def validation_split(data: DataConfig, split: str | None) -> Split:
    """The images to calibrate on, by default those that training evaluates.

    Raises:
        InputError: the split is not there, or it has images that the model was trained on, where its probabilities are
            too sure, or those that evaluation reports, which would then be chosen and reported on the same images.
    """
    try:
        images = open_split(data, split)
    except NoSplitError as error:
        raise InputError(f"{error}; name another with --split, one that was not trained on") from error
    others = ((lambda: open_split(data, data.train_split), "the model was trained on"),)
    for opened, what in (*others, (lambda: open_reported(data), "eval.py reports")):
        try:
            other = opened()
        except InputError:
            continue
        if _overlaps(images, other):
            raise InputError(
                f"split {images.name} of {data.source} has images that {what} (split {other.name}): calibrate on "
                "others, named with --split, such as a part of the training images that was left out with "
                "--data.holdout"
            )
    return images


def _overlaps(images: Split, others: Split) -> bool:
    """Whether two splits share an image: by the paths of files, and else by the names of the splits, slices aside."""
    if images.files is None or others.files is None:
        names = images.name, others.name
        return len({name.partition("[")[0] for name in names}) == 1 and not all("[" in name for name in names)
    paths = {os.path.normpath(path) for path in others.images}
    return any(os.path.normpath(path) in paths for path in images.images)
