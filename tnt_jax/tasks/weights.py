"""Class counts of the training images, and the weights of the loss that follow."""

import numpy as np
from jaxtyping import Float, Int, Num

Targets = Num[np.ndarray, "images *outputs"]


def images_per_class(targets: Targets, classes: int) -> Int[np.ndarray, " classes"]:
    """The number of images with each class or label."""
    if targets.ndim == 1:
        return np.bincount(targets, minlength=classes)
    return np.count_nonzero(targets > 0.5, axis=0)


def balanced_class_weights(targets: Targets, classes: int) -> Float[np.ndarray, " classes"]:
    """Inverse to the number of images, with a mean of 1 over the images: sklearn's `compute_class_weight`.

    A class without images has weight 1.
    """
    counts = images_per_class(targets, classes)
    there = counts > 0
    return np.divide(counts.sum(), there.sum() * counts, out=np.ones(classes), where=there)


def balanced_positive_weights(targets: Targets, classes: int) -> Float[np.ndarray, " classes"]:
    """The number of images without a label over that with it; 1 for a label that none has, or all have."""
    counts = images_per_class(targets, classes)
    varies = (counts > 0) & (counts < len(targets))
    return np.divide(len(targets) - counts, counts, out=np.ones(classes), where=varies)


BALANCED = {"class_weights": balanced_class_weights, "positive_weights": balanced_positive_weights}
"""By the fields of `LossConfig` that can be balanced."""
