"""Shares and folds: stratified, without a group in two parts, and the same each time."""

import re

import numpy as np
import pytest

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data import opening
from tnt_jax.data.sources import Split
from tnt_jax.data.splits import divided, strata_of

RNG = np.random.default_rng(0)
CLASSES = np.repeat(np.arange(4), (200, 100, 50, 7))


def source_of(targets, **fields):
    return Split(np.zeros((len(targets), 1, 1, 3), np.uint8), np.asarray(targets), tuple("abcd"), **fields)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_share_is_that_of_every_class(order, share):
    targets = CLASSES if order == "sorted" else RNG.permutation(CLASSES)
    train, test = divided(source_of(targets), DataConfig("csv:x", holdout=share))
    assert sorted([*train.images.indices, *test.images.indices]) == list(range(len(targets)))
    counts = np.bincount(test.targets, minlength=4)
    assert (np.abs(counts - share * np.bincount(targets)) <= 1).all()


def test_folds_are_disjoint_complete_and_stratified():
    source = source_of(RNG.permutation(CLASSES))
    folds = [divided(source, DataConfig("csv:x", fold=f"{k}/5"))[1] for k in range(1, 6)]
    assert sorted(np.concatenate([fold.images.indices for fold in folds])) == list(range(len(CLASSES)))
    for fold in folds:
        assert (np.abs(np.bincount(fold.targets, minlength=4) - np.bincount(CLASSES) / 5) <= 1).all()


def test_another_seed_divides_otherwise_and_the_same_one_alike():
    source = source_of(CLASSES)
    parts = [divided(source, DataConfig("csv:x", holdout=0.2, split_seed=seed))[1].images.indices for seed in (0, 0, 1)]
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


GIVEN = {"class_names": "names.txt", "other_classes": True, "label_columns": ("x",), "ignore": (0,)} | dict.fromkeys(
    ("label_separator", "group_column", "fold_column", "weight_column", "image_column", "split_column", "encoding"), "x"
)


@pytest.mark.parametrize("kind", opening.SOURCES)
def test_an_option_that_a_source_has_no_use_for_is_refused_by_its_name(kind, monkeypatch):
    def missing(*_):
        raise InputError("it is not there")

    # What is not refused is not looked for: a hub that does not answer is waited for.
    monkeypatch.setitem(opening.SOURCES, kind, opening.SOURCES[kind]._replace(open=missing))
    assert set(GIVEN) == set(opening.OPTIONS)
    source = kind if kind in ("digits", "synthetic") else f"{kind}:nowhere"
    for option, value in GIVEN.items():
        with pytest.raises(InputError) as raised:
            opening.open_split(DataConfig(source, **{option: value}), "nonsense")
        refused = f"--data.{option.replace('_', '-')} was given, and {kind}" in str(raised.value)
        assert refused == (option not in opening.SOURCES[kind].options)


@pytest.mark.parametrize(
    ("source", "guess"),
    [("x.npz", "npy:x.npz"), (".", "folder:.")],
)
def test_a_path_without_a_kind_is_guessed(source, guess):
    with pytest.raises(InputError, match=f"is none of .*did you mean {re.escape(guess)}"):
        opening.open_split(DataConfig(source), "train")


def test_groups_of_arrays_are_arrays_beside_them(tmp_path):
    images = np.arange(12, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    patients = np.array([f"p{row // 3}{' ' * (row % 2)}" for row in range(12)])
    told = {"train_patient": patients, "fold_train": np.arange(12) % 11, "train_weight": np.arange(12) / 2}
    np.savez(tmp_path / "mine.npz", train_images=images, train_labels=np.arange(12) % 2, **told)
    data = DataConfig(f"npy:{tmp_path / 'mine.npz'}", group_column="patient", holdout=0.34)
    train, test = (opening.open_split(data, split) for split in ("train", None))
    rows = [[int(part[index][0][0, 0, 0]) for index in range(len(part))] for part in (train, test)]
    assert not {row // 3 for row in rows[0]} & {row // 3 for row in rows[1]}
    assert train.weights.tolist() == [row / 2 for row in rows[0]]
    fold = opening.open_split(DataConfig(data.source, fold="11/11"), None)
    assert [int(fold[index][0][0, 0, 0]) for index in range(len(fold))] == [10]
    with pytest.raises(InputError, match=r"has no column 'ward'; it has .*'patient'"):
        opening.open_split(DataConfig(data.source, group_column="ward"), "train")
