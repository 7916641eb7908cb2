"""A `DataConfig` and a split to the images: the table of sources, and which split is for what."""

import dataclasses
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.arrays import open_numpy
from tnt_jax.data.boxes import open_box_table, open_coco, open_voc
from tnt_jax.data.folders import open_folder
from tnt_jax.data.hub_dataset import open_hub_dataset
from tnt_jax.data.idx import open_idx
from tnt_jax.data.masks import open_masks
from tnt_jax.data.records import open_array_record, open_tfds
from tnt_jax.data.sources import Noise, NoSplitError, Split, names_of_split
from tnt_jax.data.splits import divided
from tnt_jax.data.tables import open_table
from tnt_jax.tasks.table import TASKS

VALIDATION = "validation"
TABLES = (".csv", ".tsv", ".tab", ".parquet", ".pq")


def open_split(data: DataConfig, split: str | None) -> Split:
    """Opens one split of what `data.source` names; `data` also says what is a label, and what is held out.

    With `data.fold` the training and the evaluated images are parts of `data.train_split`; with `data.holdout` too,
    where the source has nothing else that evaluation reads.

    Args:
        split: "train" or "test"; what else there is depends on the source. "test" is the validation split where there
            is no test split. None is what training evaluates and chooses by: `data.eval_split`, or without one the
            validation split, the part that is held out, or the test split, the first that there is.

    Raises:
        InputError: an unknown source or split, an option that the source has no use for, or files that are missing or
            damaged.
    """
    evaluated = split is None or split == data.eval_split
    if not evaluated and split != data.train_split:
        return _open(data, split)
    if not data.fold:
        if not (evaluated or data.holdout):
            return _open(data, split)
        found = _evaluated(data)
        if found is not None:
            return found if evaluated else _open(data, split)
    training, held_out = divided(_open(data, data.train_split), data)
    return held_out if evaluated else training


def open_reported(data: DataConfig) -> Split:
    """The images that are reported of a run: the test split, which chose nothing, where there is one.

    Without one, and where `data.eval_split` or `data.fold` names what is evaluated, it is what training evaluates.
    """
    if data.eval_split is None and not data.fold:
        try:
            found = _open(data, "test")
        except NoSplitError:
            pass
        else:
            if not _is(VALIDATION, found.name) and not _is_trained_on(found, data) and _is_labelled(found):
                return found
    return open_split(data, None)


def _evaluated(data: DataConfig) -> Split | None:
    """The split that evaluation reads; None where images are held out for it."""
    names = (data.eval_split,) if data.eval_split else (VALIDATION, *(() if data.holdout else ("test",)))
    for name in names:
        try:
            found = _open(data, name)
        except NoSplitError:
            if name != names[-1] or data.holdout:
                continue
            raise
        if data.eval_split or not _is_trained_on(found, data):
            return found
    if data.holdout:
        return None
    raise InputError(f"{data.source} has no split that is not trained on; --data.holdout 0.2 takes a fifth")


def _is_labelled(found: Split) -> bool:
    """True if there is something to report: TFDS has test splits whose labels are -1."""
    try:
        there = found.targets is not None or found.tells != "labels" or found.images.labelled(0) is not None
        return len(found) > 0 and there
    except InputError:
        return False


def _is(split: str, name: str) -> bool:
    return name.lower() in names_of_split(split)


def _is_trained_on(found: Split, data: DataConfig) -> bool:
    """True if `data.train_split` names a split, as one of several too: TFDS reads `train+validation[:50%]`."""
    parts = {part.partition("[")[0].strip() for part in data.train_split.split("+")}
    return any(_is(part, found.name) for part in parts)


def _open(data: DataConfig, split: str) -> Split:
    """A split as the source has it."""
    name, argument = _kind_and_place(data.source)
    if name not in SOURCES or bool(argument) not in map(bool, SOURCES[name].places):
        forms = [f"{each}:{place}".rstrip(":") for each, of in SOURCES.items() for place in of.places]
        raise InputError(f"data source {data.source!r} is none of {', '.join(forms)}{_guess(data.source)}")
    source = SOURCES[name]
    for option in OPTIONS:
        if getattr(data, option) not in (None, (), False) and option not in source.options:
            others = ", ".join(f"{each}:" for each, other in SOURCES.items() if option in other.options)
            flag = f"--data.{option.replace('_', '-')}"
            raise InputError(f"{flag} was given, and {name}{':' * bool(argument)} has no use for it; {others} have")
    try:
        found, task = source.open(os.path.expanduser(argument), data, split), TASKS[data.task]
        if found.tells != task.told:
            fits = " or ".join(each.name for each in TASKS.values() if each.told == found.tells)
            raise InputError(
                f"{data.source} has {found.tells} of images, and data.task is {task.name}, which needs "
                f"{task.needs}: take data.task {fits}, or {task.sources}"
            )
        return found
    except NoSplitError as error:
        if split == data.train_split or data.holdout:
            raise
        remedy = "; --data.holdout 0.2 takes a fifth of the training images"
        raise NoSplitError(split, error.there_are, remedy) from error


def without_unused(data: DataConfig) -> DataConfig:
    """The same without the options that its source has no use for, which were given for another one."""
    source = SOURCES.get(_kind_and_place(data.source)[0])
    unused = set(OPTIONS) - set(source.options if source else ())
    defaults = {field.name: field.default for field in dataclasses.fields(data) if field.name in unused}
    return dataclasses.replace(data, **defaults)


def _kind_and_place(source: str) -> tuple[str, str]:
    """The two parts of `csv:FILE`; a table may be named without its kind."""
    name, colon, place = source.partition(":")
    return ("csv", source) if not colon and source.lower().endswith(TABLES) else (name, place)


def _guess(source: str) -> str:
    """The meaning of a path without a kind of source."""
    path = os.path.expanduser(source)
    if source in ("imagenet", "imagenet2012"):
        return "; did you mean tfds:imagenet2012, or array_record:PATH?"
    kind = "npy" if path.lower().endswith(".npz") else "folder" if os.path.isdir(path) else None
    return f"; did you mean {kind}:{source}?" if kind else ""


def _open_digits(argument: str, data: DataConfig, split: str) -> Split:
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
    return Split(images[chosen], scans.target[chosen], tuple(str(name) for name in scans.target_names), split)


def _open_synthetic(argument: str, data: DataConfig, split: str) -> Split:
    """As many images and classes as ImageNet has, or `synthetic:COUNT` images in either split."""
    counts = {"train": 1_281_167, "test": 50_000}
    if split not in counts:
        raise NoSplitError(split, counts)
    if argument and not argument.isdecimal():
        raise InputError(f"data source synthetic:{argument} is not synthetic:COUNT with a number of images")
    count = int(argument) if argument else counts[split]
    if TASKS[data.task].dense:
        return Split(Noise(count, TASKS[data.task].told), None, ("left", "right"), split)
    return Split(Noise(count), np.arange(count, dtype=np.int32) % 1000, tuple(map(str, range(1000))), split)


class Source(NamedTuple):
    """A kind of source, `NAME:PLACE` in a configuration."""

    open: Callable[[str, DataConfig, str], Split]
    options: tuple[str, ...] = ()
    """Those of `OPTIONS` that it honours."""
    places: tuple[str, ...] = ("PATH",)
    """For messages; empty where nothing needs to be said."""


GROUPED = ("fold_column", "group_column", "weight_column")
LABELS = ("label_columns", "label_separator", "class_names", "other_classes")
OPTIONS = (*LABELS, *GROUPED, "image_column", "split_column", "encoding", "ignore")
"""Fields of `DataConfig` that only some sources have a use for. One that was given is never ignored."""

SOURCES = {
    "digits": Source(_open_digits, places=("",)),
    "idx": Source(open_idx, ("class_names",), ("FOLDER",)),
    "folder": Source(open_folder, ("class_names", "other_classes")),
    "csv": Source(open_table, OPTIONS, ("FILE",)),
    "npy": Source(open_numpy, ("class_names", *GROUPED)),
    "hf": Source(open_hub_dataset, (*LABELS, *GROUPED, "image_column"), ("NAME",)),
    "tfds": Source(open_tfds, ("class_names", "ignore"), ("NAME",)),
    "array_record": Source(open_array_record, ("class_names", "ignore")),
    "masks": Source(open_masks, ("class_names", "ignore")),
    "coco": Source(open_coco, ("class_names",)),
    "voc": Source(open_voc, ("class_names",)),
    "boxes": Source(open_box_table, ("class_names", "label_columns", "image_column", "split_column", "encoding")),
    "synthetic": Source(_open_synthetic, places=("", "COUNT")),
}
