"""A split of a dataset: images, what is told of each, and what must stay together; images are read in any order."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tnt_jax.config import InputError
from tnt_jax.data.decode import AS_IT_IS, ImageSource, Reading, read_image
from tnt_jax.data.listing import FileNames
from tnt_jax.data.samples import Pixels

Target = int | np.ndarray
"""A class; or float32 (outputs,): 0 or 1 for each class (multi_label), or numbers (regression); or a mask, uint16
(height, width); or boxes, float32 (boxes, 7)."""


class NoSplitError(InputError):
    """A source does not have the split that was asked for."""

    def __init__(self, split: str, there_are: Iterable[str] = (), remedy: str = ""):
        self.there_are = tuple(there_are)
        listed = ", ".join(map(repr, self.there_are)) or "none"
        super().__init__(f"there is no split {split!r}; there are {listed}{remedy}")


SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "val", "valid", "validation", "testing"),
    "validation": ("validation", "val", "valid"),
    "val": ("val", "valid", "validation"),
    "valid": ("valid", "val", "validation"),
}


def names_of_split(split: str) -> tuple[str, ...]:
    """The usual names of a split in a source, the best first."""
    return SPLIT_NAMES.get(split, (split,))


class Images(Sequence):
    """Images by their places, each as `read_image` takes it. Can be pickled, so that worker processes read it too."""

    tells = "labels"
    """Of each: as `Task.told`."""

    def name(self, index: int) -> str:
        """The name of an image in messages."""
        return f"image {index}"

    def check_size(self, index: int, target: Target, size: tuple[int, int]) -> None:
        """Raises InputError where the target of an image is not for one of this height and width."""
        if self.tells == "masks" and target.shape != size:
            sizes = [f"{width} x {height}" for height, width in (target.shape, size)]
            raise InputError(
                f"{self.name(index)} is {sizes[1]} pixels, and its mask {sizes[0]}; both must be of one size"
            )

    def take(self, indices: np.ndarray) -> "Images":
        """Some of the images, in this order."""
        return _Taken(self, indices)

    def digest(self) -> str | None:
        """A checksum of which images these are; None where it takes to read them."""
        return None


@dataclasses.dataclass(frozen=True)
class _Taken(Images):
    images: Sequence | np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> ImageSource:
        return self.images[int(self.indices[index])]

    def name(self, index: int) -> str:
        return name_of(self.images, int(self.indices[index]))

    def digest(self) -> str | None:
        return self.images.digest() if isinstance(self.images, Images) else None

    @property
    def tells(self) -> str:
        return self.images.tells if isinstance(self.images, Images) else "labels"

    def check_size(self, index: int, target: Target, size: tuple[int, int]) -> None:
        if isinstance(self.images, Images):
            self.images.check_size(int(self.indices[index]), target, size)

    def labelled(self, index: int) -> tuple[ImageSource, Target]:
        return self.images.labelled(int(self.indices[index]))

    @property
    def labels(self) -> np.ndarray:
        return self.images.labels[self.indices]


@dataclasses.dataclass(frozen=True)
class ImageFiles(Images):
    """Image files, by their paths in a folder."""

    folder: str
    names: FileNames

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.folder, self.names[index])

    def name(self, index: int) -> str:
        return self[index]

    def take(self, indices: np.ndarray) -> "ImageFiles":
        return ImageFiles(self.folder, self.names.take(indices))

    def digest(self) -> str:
        return self.names.digest()


def name_of(images: Sequence, index: int) -> str:
    """The name of an image in messages."""
    return images.name(index) if isinstance(images, Images) else f"image {index}"


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a dataset, or a part of one. It can be pickled, so that worker processes can read it too."""

    images: Sequence | np.ndarray
    """Each as `read_image` takes it: paths, bytes, or pixels (height, width, channels), as in one array of all."""
    targets: np.ndarray | None
    """Of all images: int (images,) or float32 (images, outputs). None where each comes with its image."""
    class_names: tuple[str, ...]
    """Of the classes; for regression of the numbers."""
    name: str = "train"
    """The source's own name of the split, whatever was asked for."""
    reading: Reading = AS_IT_IS
    groups: np.ndarray | None = None
    """int (images,): what must not be divided between training and evaluation."""
    folds: np.ndarray | None = None
    """int (images,): the fold of each image, from 0 on."""
    weights: np.ndarray | None = None
    """float32 (images,): how often each is drawn in training, relative to the others."""
    classes: np.ndarray | None = None
    """The classes that a model is asked about, ascending; None for all."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Pixels, Target]:
        return self.read(index)

    def read(
        self, index: int, channels: int | None = None, at_least: tuple[int, int] | None = None
    ) -> tuple[Pixels, Target]:
        """Pixels (height, width, channels) of uint8, uint16 or float32, and the target. See `read_image`.

        White is 255, 65535 or 1. Raises InputError, with the name of the image, where it cannot be read.
        """
        if self.targets is None:
            image, target = self.images.labelled(index)
        else:
            image, target = self.images[index], target_of(self.targets, index)
        if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] < 4:
            channels = None  # they have no alpha to leave out; whether they fit is asked of the whole split
        name = functools.partial(self.image_name, index)
        at_least = at_least if self.tells == "labels" else None  # masks and boxes are of the whole size
        pixels = read_image(image, channels, at_least=at_least, reading=self.reading, name=name)
        if isinstance(self.images, Images):
            self.images.check_size(index, target, pixels.shape[:2])
        return pixels, target

    def image_name(self, index: int) -> str:
        """The name of an image in messages."""
        return name_of(self.images, index)

    @property
    def tells(self) -> str:
        """As `Task.told`."""
        return self.images.tells if isinstance(self.images, Images) else "labels"

    @property
    def files(self) -> FileNames | None:
        """The paths of the images below their folder; None where they are no files."""
        return self.images.names if isinstance(self.images, ImageFiles) else None

    @property
    def all_targets(self) -> np.ndarray:
        """The targets of all images, for which every image is read once where each comes with its own."""
        return self.images.labels if self.targets is None else self.targets

    def take(self, indices: np.ndarray, name: str | None = None) -> "Split":
        """Some of the images, in this order."""
        images = self.images.take(indices) if isinstance(self.images, Images) else _Taken(self.images, indices)
        parts = {field: getattr(self, field) for field in ("targets", "groups", "folds", "weights")}
        parts = {field: part if part is None else part[indices] for field, part in parts.items()}
        return dataclasses.replace(self, images=images, name=name or self.name, **parts)


def target_of(targets: np.ndarray, index: int) -> Target:
    """One of the targets of a split."""
    return int(targets[index]) if targets.ndim == 1 else targets[index]


@dataclasses.dataclass(frozen=True)
class Noise(Images):
    """Noise, without reading or decoding anything: for timing the device alone, and for trying a run out."""

    length: int
    tells: str = "labels"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng(index).integers(0, 256, (256, 256, 3), np.uint8)

    def labelled(self, index: int) -> tuple[Any, Target]:
        """With two classes by halves."""
        if self.tells == "boxes":
            halves = [(0, 0, 128, 256, 0, 0, 128 * 256), (128, 0, 256, 256, 1, 0, 128 * 256)]
            return self[index], np.array(halves, np.float32)
        return self[index], np.repeat(np.arange(2, dtype=np.uint16), 128)[None].repeat(256, 0)

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(self.length, np.int32)
