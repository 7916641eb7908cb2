"""Calibration of probabilities: a temperature, and thresholds of labels. NumPy, on the host."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Num

from tnt_jax.errors import InputError

MAX_TEMPERATURE = 20
Loss = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logits and labels to numbers whose mean is the cross-entropy."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The temperature and thresholds, and metrics before and after."""

    temperature: float
    """The divisor of the logits."""
    thresholds: Float[np.ndarray, " labels"] | None
    """Of labels: the probability from which on each is predicted."""
    images: int
    before: dict[str, float]
    """ece and loss, and of labels macro_f1, on the images that it was fitted to."""
    after: dict[str, float]


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, on average over the images.

    Images are put into equal bins of confidence. Source: Guo et al., arXiv 1706.04599, with their 15 bins.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    gaps = np.abs(np.bincount(place, right, bins) - np.bincount(place, confidence, bins))
    return float(gaps.sum() / counts.sum())


def sound_temperature(
    logits: Float[np.ndarray, "images outputs"],
    labels: Num[np.ndarray, "images ..."],
    loss: Loss,
    right: Bool[np.ndarray, "images ..."],
    source: str,
) -> float:
    """The temperature of the least cross-entropy, where the images say one.

    Args:
        right: the predictions that are.
        source: of the images, for messages.

    Raises:
        InputError: no temperature is best.
    """
    # Without a mistake the loss falls with the temperature for ever, and probabilities become 100% of anything.
    if right.all():
        raise InputError(
            f"all {len(labels)} images of {source} are predicted without a mistake: no temperature is best, since the "
            "loss falls to 0 with it; calibrate on other images, or on more"
        )
    temperature = fit_temperature(logits, labels, loss)
    if not max(temperature, 1 / temperature) * 1.001 < MAX_TEMPERATURE:
        raise InputError(
            f"the least loss on the {len(labels)} images of {source} lies at the bound of temperatures, "
            f"{temperature:.3g}: they do not say how sure the model should be; calibrate on other images, or on more"
        )
    return temperature


def fit_temperature(logits: np.ndarray, labels: np.ndarray, loss: Loss) -> float:
    """The temperature of the least cross-entropy, between 1 / MAX_TEMPERATURE and MAX_TEMPERATURE."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: loss(logits / np.exp(log), labels).mean(),
        bounds=(-np.log(MAX_TEMPERATURE), np.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


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
