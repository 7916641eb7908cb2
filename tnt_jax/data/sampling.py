"""The frequency of each image in an epoch: by its class, and by the weights of a table."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from tnt_jax.config import InputError
from tnt_jax.tasks.weights import Targets, images_per_class


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """The frequency of each image in an epoch. Compared by identity, so that orders can be kept by it."""

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
    counts = images_per_class(targets, classes)
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
