"""Folders of images: a folder per split, in it a folder per class."""

import collections
import logging
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.columns import class_names_of
from tnt_jax.data.decode import Reading
from tnt_jax.data.listing import SUFFIXES, FileNames, Walk, folders_in, identity_of, labels_of, natural_key
from tnt_jax.data.sources import ImageFiles, NoSplitError, Split, names_of_split
from tnt_jax.data.tables import check_classes, listed

LABEL_FILE = "labels.txt"
logger = logging.getLogger(__name__)


def open_folder(argument: str, data: DataConfig, split: str) -> Split:
    """A folder per split, in it a folder per class, in it images, nested or not. Classes are sorted by name.

    A split may also hold its images flat, beside a `labels.txt` that names the class of each: so ImageNet ships its
    validation images. The classes are those of the training images.

    Raises:
        InputError: there is no such folder or split, or no image of a class.
    """
    root = pathlib.Path(argument).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    folder = _split_folder(root, split)
    training = _split_folder(root, data.train_split)
    if training is None and _holds_classes(root):
        if split != data.train_split:
            raise NoSplitError(split, (data.train_split,))
        folder = training = root
    if folder is None:
        raise NoSplitError(split, folders_in(root))
    training = training or folder
    here = () if (folder / LABEL_FILE).is_file() else folders_in(folder)
    trained = [_class_of(name) for name in folders_in(training)]
    # Where other classes are allowed they are those of all splits that are evaluated, whichever is opened.
    others = (data.eval_split or "validation", "test") if data.other_classes else ()
    evaluated = [found for each in others if (found := _split_folder(root, each))]
    there = {*here, *(name for each in evaluated for name in folders_in(each))}
    class_names = class_names_of(data, {*trained, *map(_class_of, there)})
    if (
        unknown := sorted({*trained, *map(_class_of, here)} - set(class_names), key=natural_key)
        if data.class_names
        else []
    ):
        raise InputError(
            f"{data.class_names} does not name the class folders {listed(unknown)} of {root}; it has {len(class_names)}"
        )
    walk = Walk()
    if (folder / LABEL_FILE).is_file():
        names = list(walk(str(folder)))
        walk.left_out -= collections.Counter([pathlib.Path(LABEL_FILE).suffix])  # it names the classes
        files = FileNames([("", names)])
        targets = np.array(read_labels(folder / LABEL_FILE, names, _numbers_of(class_names).get), np.int32)
    elif here:
        files, targets = _of_class_folders(folder, here, class_names, walk)
    else:
        raise InputError(f"{folder} holds neither class folders nor a {LABEL_FILE}")
    _check(folder, class_names, trained, targets, walk, data, split)
    name = data.train_split if folder == root else folder.name
    return Split(ImageFiles(str(folder), files), targets, class_names, name, Reading.of(data))


def _class_of(folder: str) -> str:
    """The name of the class in a folder: bytes that are no UTF-8 are written as `\\xe9`, which every file can hold."""
    return os.fsencode(folder).decode(errors="backslashreplace")


def _numbers_of(class_names: Sequence[str]) -> dict[str, int]:
    """The number of each class by its name, and by itself where no class is called so."""
    return {str(number): number for number in range(len(class_names))} | {
        name: number for number, name in enumerate(class_names)
    }


def _split_folder(root: pathlib.Path, split: str) -> pathlib.Path | None:
    """The folder of a split, by any of its names in any capitals: the first that has labels, or else the first."""
    there = {name.lower(): name for name in folders_in(root)[::-1]}
    found = [root / there[name.lower()] for name in names_of_split(split) if name.lower() in there]
    exact = root / split
    if exact in found:
        found.insert(0, found.pop(found.index(exact)))
    labelled = [folder for folder in found if (folder / LABEL_FILE).is_file() or folders_in(folder)]
    if labelled and labelled[0] != found[0]:
        logger.warning("%s has no labels: %s is split %r", found[0], labelled[0], split)
    return next(iter(labelled or found), None)


def _holds_classes(root: pathlib.Path) -> bool:
    """True if the folders in a folder are classes, and no splits: none is called like one, and all have images."""
    known = {name for split in ("train", "test", "validation") for name in names_of_split(split)}
    found = folders_in(root)
    return bool(found) and all(
        name.lower() not in known and any(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(root / name))
        for name in found
    )


def _of_class_folders(
    folder: pathlib.Path, here: Sequence[str], class_names: tuple[str, ...], walk: Walk
) -> tuple[FileNames, np.ndarray]:
    numbers = {name: number for number, name in enumerate(class_names)}
    counts = []
    # A link from one class to another, or upwards, leads where images are of another class.
    walk.seen |= {identity_of(os.stat(place)) for place in (folder, *(folder / name for name in here))}

    def images_of_class(name: str) -> tuple[str, list[str]]:
        found = list(walk(str(folder / name)))
        counts.append(len(found))
        return name, found

    files = FileNames(map(images_of_class, here))
    return files, labels_of(counts, [numbers[_class_of(name)] for name in here])


def _check(folder, class_names, trained, targets, walk: Walk, data: DataConfig, split: str) -> None:
    if others := walk.what_was_left_out():
        logger.warning("%s: left out what is no image: %s", folder, others)
    if walk.broken and not data.skip_unreadable:
        raise InputError(f"{folder}: {len(walk.broken)} links to images lead nowhere: {listed(walk.broken)}")
    if not len(targets):
        raise InputError(f"{folder} holds no image; known are {', '.join(SUFFIXES)}")
    count = len(class_names)
    here = np.bincount(targets, minlength=count) > 0
    if split == data.train_split and (empty := [name for name in trained if not here[class_names.index(name)]]):
        raise InputError(f"class folder {folder / empty[0]} holds no image; known are {', '.join(SUFFIXES)}")
    check_classes(class_names, np.isin(class_names, trained), here, str(folder), data, split)


def read_labels(path: pathlib.Path, names: Sequence[str], number_of: Callable[[str], int | None]) -> list[int]:
    """The class of each image from a file: `file label` in a line in any order, or a label in the order of the images.

    Between file and label are tabs, commas or spaces.

    Args:
        names: paths of the images, in the one order of all files.
        number_of: gives the class that a label stands for; None where it is none.

    Raises:
        InputError: it cannot be read, a label is no class, or an image has none.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read as a list of labels: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
        logger.warning("%s is not UTF-8, and is read as Latin-1", path)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    places = {name: place for place, name in enumerate(names)}
    pairs = [_pair(line, places) for _, line in lines]
    if not any(pairs):
        if len(lines) != len(names):
            raise InputError(f"{path} has {len(lines)} lines, and {len(names)} images lie beside it")
        return [_label(path, number, line, number_of) for number, line in lines]
    labels: list[int | None] = [None] * len(names)
    for (number, line), pair in zip(lines, pairs, strict=True):
        if pair is None:
            raise InputError(f"{path}, line {number}: {line!r} names no image that lies beside it")
        if labels[pair[0]] is not None:
            raise InputError(f"{path}, line {number}: {names[pair[0]]} has a label already")
        labels[pair[0]] = _label(path, number, pair[1], number_of)
    if None in labels:
        raise InputError(
            f"{path} has no label of {labels.count(None)} images: "
            f"{listed([name for name, label in zip(names, labels, strict=True) if label is None])}"
        )
    return labels


def _pair(line: str, places: dict[str, int]) -> tuple[int, str] | None:
    """The image of a line and its label; None where it does not begin with a file."""
    for separator in ("\t", ",", " "):
        head, _, rest = line.partition(separator)
        # File names may have spaces: the longest that is there counts.
        while rest and head.strip() not in places and separator in rest:
            more, _, rest = rest.partition(separator)
            head += separator + more
        if rest.strip() and head.strip() in places:
            return places[head.strip()], rest.strip()
    return None


def _label(path: pathlib.Path, line: int, text: str, number_of: Callable[[str], int | None]) -> int:
    number = number_of(text)
    if number is None:
        raise InputError(f"{path}, line {line}: {text!r} is none of the classes")
    return number
