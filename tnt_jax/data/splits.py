"""Training images divided into those that are trained on and those that are evaluated: a share, or folds.

Both are stratified, a function of the targets, the groups and a seed alone, and never divide a group.
"""

import re

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.sources import Split

BINS = 10
"""Strata of a number that is to be predicted."""


def parse_fold(fold: str) -> tuple[int, int]:
    """`2/5` as 1 and 5: which fold, from 0 on, and how many there are.

    Raises:
        InputError: it is something else.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", fold)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) or int(found[2]) < 2:
        raise InputError(f"data.fold is {fold!r}, and must be K/N: the K-th of N folds, such as 2/5")
    return int(found[1]) - 1, int(found[2])


def divided(source: Split, data: DataConfig) -> tuple[Split, Split]:
    """The training images that `data.fold` or `data.holdout` leaves, and those that are evaluated.

    Raises:
        InputError: a part is empty, or the data have other folds than `data.fold` says.
    """
    evaluated = in_fold(source, data) if data.fold else held_out(source, data)
    names = (source.name, f"fold {data.fold}" if data.fold else "holdout")
    rows = [np.flatnonzero(chosen).astype(np.int32) for chosen in (~evaluated, evaluated)]
    parts = [source.take(*each) for each in zip(rows, names, strict=True)]
    what = f"data.fold {data.fold}" if data.fold else f"data.holdout {data.holdout:g}"
    for part, name in zip(parts, ("train on", "evaluate"), strict=True):
        if not len(part):
            in_groups = "" if source.groups is None else f" in {len(np.unique(source.groups))} groups"
            raise InputError(f"{what} leaves no image to {name}: there are {len(source)} images{in_groups}")
    return parts[0], parts[1]


def in_fold(source: Split, data: DataConfig) -> np.ndarray:
    """True for images in the fold that `data.fold` names, bool (images,)."""
    fold, count = parse_fold(data.fold)
    if source.folds is None:
        return shuffled_places(source, data.split_seed) % count == fold
    there = np.unique(source.folds)
    if len(there) != count:
        raise InputError(f"data.fold is {data.fold}, and the column of folds has {len(there)} different values")
    return source.folds == there[fold]


def held_out(source: Split, data: DataConfig) -> np.ndarray:
    """True for images that are evaluated, bool (images,): of each stratum the share `data.holdout`.

    What is alone in its stratum is trained on.
    """
    places, strata = shuffled_places(source, data.split_seed), strata_of(source.all_targets)
    chosen = np.floor((places + 1) * data.holdout) > np.floor(places * data.holdout)
    if source.groups is None:
        chosen &= np.bincount(strata)[strata] > 1
    return chosen


def shuffled_places(source: Split, seed: int) -> np.ndarray:
    """A place for each image, int (images,): strata one after another, at random in each; a group has one place."""
    strata, groups = strata_of(source.all_targets), source.groups
    rng = np.random.default_rng((seed, 2))
    if groups is None:
        order = np.lexsort((rng.permutation(len(strata)), strata))
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        return places
    _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    # A group is of the stratum that most of its images have, and groups of one size stand together.
    pairs, counts = np.unique(np.stack([members, strata]), axis=1, return_counts=True)
    stratum = np.empty(len(sizes), np.int64)
    by_count = np.argsort(counts, kind="stable")
    stratum[pairs[0, by_count]] = pairs[1, by_count]
    order = np.lexsort((rng.permutation(len(sizes)), sizes, stratum))
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places[members]


def strata_of(targets: np.ndarray) -> np.ndarray:
    """The strata, which are to be equally frequent in each part, int (images,).

    The class; of several labels the rarest that an image has; of numbers the tenth in which the first one lies.
    """
    if targets.ndim == 1:
        return np.unique(targets, return_inverse=True)[1]
    if np.isin(targets, (0, 1)).all() and targets.shape[1] > 1:
        rarity = np.argsort(np.argsort(targets.sum(axis=0), kind="stable"), kind="stable")
        ranks = np.where(targets > 0, rarity, targets.shape[1])
        return ranks.min(axis=1)
    cuts = np.quantile(targets[:, 0], np.arange(1, BINS) / BINS)
    return np.searchsorted(cuts, targets[:, 0], side="right")
