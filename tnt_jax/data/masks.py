"""Images with a mask each: files beside each other, and what their values mean.

A mask says the class of each pixel by its number: a PNG in grey of 8 or 16 bits or with a palette, or another format
that loses nothing. 255 is ignored, or 65535 where there are more than 255 classes.
"""

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt16

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.classes import read_class_names
from tnt_jax.data.decode import Reading, read_mask
from tnt_jax.data.listing import FileNames, Walk, folders_in
from tnt_jax.data.sources import ImageFiles, NoSplitError, Split, names_of_split
from tnt_jax.tasks.segmentation import IGNORED

IMAGES, MASKS = ("images", "image"), ("masks", "mask", "annotations", "labels")
CLASSES = "classes.txt"
WRONG = IGNORED - 1
"""In a table of values, what means nothing."""
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Meaning:
    """The meaning of the values of masks."""

    names: tuple[str, ...]
    ignore: tuple[int, ...] = ()
    """Values that are no class, beside the usual one; the classes are the other values in their order."""

    @functools.cached_property
    def ignored(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.ignore, *((255,) if len(self.names) <= 255 else ()), IGNORED)

    @functools.cached_property
    def table(self) -> UInt16[np.ndarray, " values"]:
        """The class of every value, `IGNORED` or `WRONG`."""
        table = np.full(IGNORED + 1, WRONG, np.uint16)
        table[list(self.ignored)] = IGNORED
        values = np.setdiff1d(np.arange(IGNORED), self.ignored)[: len(self.names)]
        table[values] = np.arange(len(values))
        return table

    def classes(self, values: np.ndarray, name: str) -> UInt16[np.ndarray, "height width"]:
        """The class of each pixel of a mask. Raises InputError, with the place, for a value that means nothing."""
        found = self.table[values]
        if (wrong := found == WRONG).any():
            row, column = np.argwhere(wrong)[0].tolist()
            known = np.flatnonzero(self.table < WRONG)
            raise InputError(
                f"{name} has the value {values[row, column]} in row {row}, column {column}; the {len(self.names)} "
                f"classes are {known[0]} to {known[-1]}, and ignored is {' or '.join(map(str, self.ignored))}"
            )
        return found


@dataclasses.dataclass(frozen=True)
class MaskedFiles(ImageFiles):
    """Image files, each with the file of its mask."""

    masks: ImageFiles
    meaning: Meaning
    max_pixels: int = DataConfig.max_pixels
    tells = "masks"

    def labelled(self, index: int) -> tuple[str, UInt16[np.ndarray, "height width"]]:
        path = self.masks[index]
        return self[index], self.meaning.classes(read_mask(path, self.max_pixels), path)

    @property
    def labels(self) -> np.ndarray:
        """No class of a whole image is told: all are alike."""
        return np.zeros(len(self), np.int32)

    def take(self, indices: np.ndarray) -> "MaskedFiles":
        return dataclasses.replace(self, names=self.names.take(indices), masks=self.masks.take(indices))

    def digest(self) -> str:
        whole = super().digest() + self.masks.digest() + repr(self.meaning.ignore)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


def open_masks(argument: str, data: DataConfig, split: str) -> Split:
    """`images` and `masks` in a folder, or in one for each split, with the same names but for their endings.

    `images/SPLIT` and `masks/SPLIT` are read too, and a folder `annotations` or `labels` for `masks`. Classes are
    called as `data.class_names` or a `classes.txt` says, one a line, else by their numbers, for which all training
    masks are read.

    Raises:
        InputError: there is no such folder or split, an image has no mask, or a mask cannot be read.
    """
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    found, training = _of_split(root, split, data), _of_split(root, data.train_split, data)
    if found is None:
        raise NoSplitError(split, [name for name in ("train", "validation", "test") if _of_split(root, name, data)])
    name, images, masks = found
    files = _pairs(images, masks)
    classes = data.class_names or (str(root / CLASSES) if (root / CLASSES).is_file() else None)
    names = read_class_names(classes) if classes else class_numbers(_pairs(*(training or found)[1:])[1], data)
    return split_of_files(files, names, data, name)


def split_of_files(files: tuple[ImageFiles, ImageFiles], names: Sequence[str], data: DataConfig, split: str) -> Split:
    """A split of images and their masks."""
    images, masks = files
    meaning = Meaning(tuple(names), data.ignore)
    masked = MaskedFiles(images.folder, images.names, masks, meaning, data.max_pixels)
    return Split(masked, None, meaning.names, split, Reading.of(data))


def _of_split(root: Path, split: str, data: DataConfig) -> tuple[str, Path, Path] | None:
    """The name of a split here, and the folders with its images and its masks."""
    here = {name.lower(): name for name in folders_in(root)}
    both = [next((root / here[name] for name in names if name in here), None) for names in (IMAGES, MASKS)]
    for name in names_of_split(split):
        if name in here:
            inside = {each.lower(): root / here[name] / each for each in folders_in(root / here[name])}
            pair = [next((inside[each] for each in names if each in inside), None) for names in (IMAGES, MASKS)]
            if all(pair):
                return here[name], *pair
        if all(both) and all((each / name).is_dir() for each in both):
            return name, *(each / name for each in both)
    splits = {*names_of_split("train"), *names_of_split("test")}
    if all(both) and splits.isdisjoint(folders_in(both[0])) and split in names_of_split(data.train_split):
        return data.train_split, *both
    return None


def _pairs(images: Path, masks: Path) -> tuple[ImageFiles, ImageFiles]:
    """The files of a folder of images, and of each its mask."""
    walk = Walk()
    names = list(walk(str(images)))
    if not names:
        raise InputError(f"{images} holds no image")
    of_stem: dict[str, str] = {}
    for name in Walk()(str(masks)):
        stem = os.path.splitext(name)[0]
        if stem in of_stem:
            raise InputError(f"{masks} has two masks of one image: {of_stem[stem]} and {name}")
        of_stem[stem] = name
    stems = [os.path.splitext(name)[0] for name in names]
    if lacking := [name for name, stem in zip(names, stems, strict=True) if stem not in of_stem]:
        raise InputError(
            f"{len(lacking)} of {len(names)} images in {images} have no mask in {masks}, first {lacking[0]}: "
            f"{os.path.splitext(lacking[0])[0]}.png should lie there"
        )
    if others := sorted(of_stem.keys() - set(stems)):
        logger.warning("%s has %d masks without an image, left out, first %s", masks, len(others), of_stem[others[0]])
    return tuple(
        ImageFiles(str(folder), FileNames([("", chosen)]))
        for folder, chosen in ((images, names), (masks, [of_stem[stem] for stem in stems]))
    )


def class_numbers(masks: Sequence, data: DataConfig) -> tuple[str, ...]:
    """The numbers of the classes from 0 to the greatest of all masks, as text.

    Args:
        masks: paths of files, or their bytes.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        of_each = pool.map(lambda mask: np.unique(read_mask(mask, data.max_pixels)), masks)
        values = np.setdiff1d(np.unique(np.concatenate(list(of_each))), [255, IGNORED, *data.ignore])
    if not len(values):
        raise InputError(f"no mask of {data.source} has a class: all of their pixels are ignored")
    count = np.setdiff1d(np.arange(values[-1] + 1), data.ignore).size
    logger.info("%s: the greatest class of all masks is %d; a %s can name them", data.source, values[-1], CLASSES)
    return tuple(map(str, range(count)))
