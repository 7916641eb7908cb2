"""A `DataConfig` and a split to a source."""

import os

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.arrays import open_numpy
from tnt_jax.data.folders import open_folder
from tnt_jax.data.hub_dataset import open_hub_dataset
from tnt_jax.data.idx import open_idx
from tnt_jax.data.records import open_array_record, open_tfds
from tnt_jax.data.sources import ArraySource, NoSplitError, Source, SyntheticSource
from tnt_jax.data.splits import divided
from tnt_jax.data.tables import open_table


def open_split(data: DataConfig, split: str) -> Source:
    """Opens one split of what `data.source` names; `data` also says what is a label, and what is held out.

    With `data.fold`, `data.train_split` and `data.eval_split` are parts of the training images; with `data.holdout`
    too, where the source has no `data.eval_split`.

    Args:
        split: "train" or "test"; what else there is depends on the source. "test" is the validation split where there
            is no test split.

    Raises:
        InputError: an unknown source or split, or files that are missing or damaged.
    """
    if split not in (data.train_split, data.eval_split) or not (data.fold or data.holdout):
        return _open(data, split)
    if not data.fold:
        try:
            found = _open(data, data.eval_split)
        except NoSplitError:
            pass
        else:
            return found if split == data.eval_split else _open(data, split)
    training, evaluated = divided(_open(data, data.train_split), data)
    return training if split == data.train_split else evaluated


def _open(data: DataConfig, split: str) -> Source:
    """A split as the source has it."""
    name, _, argument = data.source.partition(":")
    if name not in SOURCES or (name != "synthetic" and bool(argument) != (name != "digits")):
        known = "digits, idx:FOLDER, folder:PATH, csv:FILE, npy:PATH, hf:NAME, tfds:NAME, array_record:PATH, synthetic"
        raise InputError(f"data source {data.source!r} is none of {known}, synthetic:COUNT")
    try:
        return SOURCES[name](os.path.expanduser(argument), data, split)
    except NoSplitError as error:
        if split != data.eval_split or data.holdout:
            raise
        raise NoSplitError(
            split, error.there_are, "; --data.holdout 0.2 takes a fifth of the training images"
        ) from error


def _digits(argument: str, data: DataConfig, split: str) -> ArraySource:
    """The 1,797 scans of 8x8 pixels that scikit-learn ships, as dark ink on white paper.

    1,437 to train, 360 to test.
    """
    if split not in ("train", "test"):
        raise NoSplitError(split, ("train", "test"))
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    ink = scans.images / 16  # 0 is paper, 16 is the most ink
    images = np.round(255 * (1 - ink)).astype(np.uint8)[..., None]
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=scans.target, random_state=0)
    chosen = train if split == "train" else test
    return ArraySource(images[chosen], scans.target[chosen], tuple(str(name) for name in scans.target_names))


def _synthetic(argument: str, data: DataConfig, split: str) -> SyntheticSource:
    """As many images and classes as ImageNet has, or `synthetic:COUNT` images in either split."""
    counts = {"train": 1_281_167, "test": 50_000}
    if split not in counts:
        raise NoSplitError(split, counts)
    if argument and not argument.isdecimal():
        raise InputError(f"data source synthetic:{argument} is not synthetic:COUNT with a number of images")
    return SyntheticSource(int(argument) if argument else counts[split])


SOURCES = {
    "digits": _digits,
    "idx": open_idx,
    "folder": open_folder,
    "csv": open_table,
    "npy": open_numpy,
    "hf": open_hub_dataset,
    "tfds": open_tfds,
    "array_record": open_array_record,
    "synthetic": _synthetic,
}
