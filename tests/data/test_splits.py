"""Shares and folds: stratified, without a group in two parts, and the same each time."""

import dataclasses

import numpy as np
import pytest

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.sources import ArraySource
from tnt_jax.data.splits import divided, strata_of

RNG = np.random.default_rng(0)
CLASSES = np.repeat(np.arange(4), (200, 100, 50, 7))


@dataclasses.dataclass(frozen=True)
class Grouped(ArraySource):
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None


def source_of(targets, **fields):
    return Grouped(np.zeros((len(targets), 1, 1, 3), np.uint8), np.asarray(targets), tuple("abcd"), **fields)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_share_is_that_of_every_class(order, share):
    targets = CLASSES if order == "sorted" else RNG.permutation(CLASSES)
    train, test = divided(source_of(targets), DataConfig("csv:x", holdout=share))
    assert sorted([*train.indices, *test.indices]) == list(range(len(targets)))
    counts = np.bincount(test.targets, minlength=4)
    assert (np.abs(counts - share * np.bincount(targets)) <= 1).all()


def test_folds_are_disjoint_complete_and_stratified():
    source = source_of(RNG.permutation(CLASSES))
    folds = [divided(source, DataConfig("csv:x", fold=f"{k}/5"))[1] for k in range(1, 6)]
    assert sorted(np.concatenate([fold.indices for fold in folds])) == list(range(len(CLASSES)))
    for fold in folds:
        assert (np.abs(np.bincount(fold.targets, minlength=4) - np.bincount(CLASSES) / 5) <= 1).all()


def test_another_seed_divides_otherwise_and_the_same_one_alike():
    source = source_of(CLASSES)
    parts = [divided(source, DataConfig("csv:x", holdout=0.2, split_seed=seed))[1].indices for seed in (0, 0, 1)]
    np.testing.assert_array_equal(parts[0], parts[1])
    assert set(parts[0]) != set(parts[2])


@pytest.mark.parametrize("fields", [{"holdout": 0.25}, {"fold": "2/4"}])
def test_groups_are_never_divided(fields):
    groups = RNG.integers(0, 80, len(CLASSES))
    train, test = divided(source_of(CLASSES, groups=groups), DataConfig("csv:x", **fields))
    assert not set(train.groups) & set(test.groups)
    assert 0.1 < len(test) / len(CLASSES) < 0.4


def test_folds_of_a_column_are_taken():
    folds = np.arange(len(CLASSES)) % 3
    _, test = divided(source_of(CLASSES, folds=folds), DataConfig("csv:x", fold="2/3"))
    assert set(test.folds) == {1}
    with pytest.raises(InputError, match=r"data.fold is 1/5, and the column of folds has 3 different values"):
        divided(source_of(CLASSES, folds=folds), DataConfig("csv:x", fold="1/5"))


def test_what_is_left_empty_is_said():
    groups = np.zeros(len(CLASSES), int)
    with pytest.raises(InputError, match="fold 2/2 leaves no image to evaluate: there are 357 images in 1 groups"):
        divided(source_of(CLASSES, groups=groups), DataConfig("csv:x", fold="2/2"))
    with pytest.raises(InputError, match=r"holdout 0.001 leaves no image to evaluate"):
        divided(source_of(CLASSES), DataConfig("csv:x", holdout=0.001))


def test_strata_of_labels_and_numbers():
    several = np.array([[1, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    assert len(set(strata_of(several)[[0, 1, 3]])) == 3  # the rare label, the frequent one, none
    numbers = np.linspace(0, 1, 100, dtype=np.float32)[:, None]
    assert np.bincount(strata_of(numbers)).tolist() == [10] * 10
    train, test = divided(source_of(numbers), DataConfig("csv:x", holdout=0.2, task="regression"))
    assert abs(train.targets.mean() - test.targets.mean()) < 0.05
