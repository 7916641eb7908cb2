"""What the targets of all training images say: whether they are sound, how often each class is there, and what follows.

Targets are int (images,) for single_label, and float32 (images, outputs) of 0 and 1 for multi_label and of numbers for
regression.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num
from numpy.typing import ArrayLike

from tnt_jax.config import DataConfig, InputError

Targets = Num[np.ndarray, "images *outputs"]
KINDS = {
    "single_label": "one class of each image",
    "multi_label": "0 or 1 for each label of each image",
    "regression": "a number for each target of each image",
}


def check_targets(targets: Targets, data: DataConfig, class_names: Sequence[str], name: str) -> None:
    """Makes sure that the targets of a split are what the task needs.

    Args:
        name: of the split, for messages.

    Raises:
        InputError: they are not.
    """
    axes = 1 if data.task == "single_label" else 2
    if targets.ndim != axes or (axes == 2 and targets.shape[1] != len(class_names)):
        raise InputError(
            f"{name} has targets of shape {targets.shape} and {len(class_names)} names; data.task {data.task} needs "
            f"{KINDS[data.task]}"
        )
    if data.task == "single_label":
        least, most = int(targets.min()), int(targets.max())
        if not 0 <= least <= most < len(class_names):
            raise InputError(f"{name} has labels from {least} to {most}, and there are {len(class_names)} classes")
        return
    wrong = ~np.isfinite(targets) if data.task == "regression" else (targets != 0) & (targets != 1)
    if wrong.any():
        image, output = np.argwhere(wrong)[0]
        raise InputError(
            f"{name} has {targets[image, output]} for {class_names[output]!r} of image {image}; data.task {data.task} "
            f"needs {'finite numbers' if data.task == 'regression' else '0 or 1'}"
        )


def check_training_targets(targets: Targets, data: DataConfig, class_names: Sequence[str]) -> None:
    """Makes sure that there is something to learn.

    Raises:
        InputError: a target of a regression is the same for all training images.
    """
    if data.task == "regression":
        for output in np.flatnonzero(np.ptp(targets, axis=0) == 0):
            raise InputError(
                f"the target {class_names[output]!r} is {targets[0, output]:g} for all {len(targets)} training images "
                f"of {data.source}; there is nothing to learn"
            )


def class_counts(targets: Targets, classes: int) -> Int[np.ndarray, " classes"]:
    """How many images have each class or label."""
    if targets.ndim == 1:
        return np.bincount(targets, minlength=classes)
    return np.count_nonzero(targets > 0.5, axis=0)


def balanced_class_weights(targets: Targets, classes: int) -> Float[np.ndarray, " classes"]:
    """Inverse to the number of images, with a mean of 1 over the images: sklearn's `compute_class_weight`.

    A class without images has weight 1.
    """
    counts = class_counts(targets, classes)
    there = counts > 0
    return np.divide(counts.sum(), there.sum() * counts, out=np.ones(classes), where=there)


def balanced_positive_weights(targets: Targets, classes: int) -> Float[np.ndarray, " classes"]:
    """How many images are without a label over how many have it; 1 for a label that none has, or all have."""
    counts = class_counts(targets, classes)
    varies = (counts > 0) & (counts < len(targets))
    return np.divide(len(targets) - counts, counts, out=np.ones(classes), where=varies)


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """How often an epoch wants each image. Compared by identity, so that orders can be kept by it."""

    of_image: Float[np.ndarray, " images"]
    """In proportion; the mean is 1."""
    group: Int[np.ndarray, " images"]
    """The class; of several labels the one that decides."""


def image_shares(
    targets: Targets, sampling: str, classes: int, weights: Float[np.ndarray, " images"] | None = None
) -> Shares | None:
    """The shares of balanced or sqrt sampling, times the weights of the images; None for natural without weights.

    A class of n images has n ** 0 or n ** 0.5 of the places of an epoch, which its images share. An image of several
    labels has the share that its rarest one gives it; images of none are a class of their own.
    """
    if sampling == "natural":
        return None if weights is None else _shares(weights, np.zeros(len(targets), np.int32))
    counts = class_counts(targets, classes)
    if targets.ndim == 1:
        group = targets.astype(np.int32)
    else:
        none = np.count_nonzero(~(targets > 0.5).any(axis=1))
        rarity = np.where(targets > 0.5, np.where(counts > 0, counts, 1), np.inf)
        group = np.where(np.isfinite(rarity).any(axis=1), rarity.argmin(axis=1), classes).astype(np.int32)
        counts = np.append(counts, none)
    power = {"balanced": -1.0, "sqrt": -0.5}[sampling]
    return _shares(counts[group] ** power * (1.0 if weights is None else weights), group)


def _shares(of_image: Float[np.ndarray, " images"], group: Int[np.ndarray, " images"]) -> Shares:
    if not of_image.any():
        raise InputError(f"all {len(of_image)} training images have weight 0; there is none to train on")
    return Shares(of_image / of_image.mean(dtype=np.float64), group)


def weighted_order(shares: Shares, rng: np.random.Generator) -> Int[np.ndarray, " images"]:
    """As many places as there are images, in random order, each image as often as its share says, rounded up or down.

    Groups have their shares of the places to within one: systematic sampling over the images, sorted by group.
    """
    count = len(shares.group)
    images = rng.permutation(count)
    images = images[np.argsort(shares.group[images], kind="stable")]
    places = np.cumsum(shares.of_image[images])
    ends = np.minimum(np.floor(places * (count / places[-1]) + rng.random()).astype(np.int64), count)
    ends[-1] = count
    order = np.repeat(images, np.diff(ends, prepend=0))
    return rng.permutation(order).astype(np.int32)


def in_units(
    outputs: ArrayLike,
    mean: Sequence[float] | np.ndarray | None,
    std: Sequence[float] | np.ndarray | None,
) -> Float[np.ndarray, "*images outputs"]:
    """What a network of standardised targets says, (..., outputs), in the units of the targets, in float64."""
    outputs = np.asarray(outputs, np.float64)
    return outputs if mean is None else outputs * np.asarray(std, np.float64) + np.asarray(mean, np.float64)
