"""What a source is: index to (image, target), at random and without state. In memory, as noise, or part of another."""

import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from tnt_jax.config import InputError
from tnt_jax.data.decode import AS_IT_IS, Reading, read_image
from tnt_jax.data.listing import FileNames
from tnt_jax.data.samples import Pixels

Target = int | np.ndarray
"""A class; or float32 (outputs,): 0 or 1 for each class (multi_label), or numbers (regression)."""


@runtime_checkable
class Source(Protocol):
    """One split of a dataset. It can be pickled, so that worker processes can read it too.

    A source of files also has `files`, their names, and `read(index, channels, at_least)`, which reads an image for a
    model of so many channels, at a fraction of its size where that is large enough.
    """

    class_names: tuple[str, ...]
    """Of the classes; for regression of the numbers."""
    if TYPE_CHECKING:  # asked for at run time, records would be read to know whether they are there
        targets: np.ndarray
        """Of all images, without reading them: int (images,) or float32 (images, outputs)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Pixels, Target]:
        """Pixels (height, width, channels) of uint8, uint16 or float32, and the target.

        White is 255, 65535 or 1. Raises InputError, with the name of the image, where it cannot be read.
        """


class NoSplitError(InputError):
    """A source does not have the split that was asked for."""

    def __init__(self, split: str, there_are: Iterable[str] = (), remedy: str = ""):
        self.there_are = tuple(there_are)
        listed = ", ".join(map(repr, self.there_are)) or "none"
        super().__init__(f"there is no split {split!r}; there are {listed}{remedy}")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory, (images, height, width, channels), and their targets."""

    images: np.ndarray
    targets: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        return self.images[index], target_of(self.targets, index)


SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "val", "valid", "validation", "testing"),
    "validation": ("validation", "val", "valid"),
    "val": ("val", "valid", "validation"),
    "valid": ("valid", "val", "validation"),
}


def names_of_split(split: str) -> tuple[str, ...]:
    """What a split may be called in a source, the best first."""
    return SPLIT_NAMES.get(split, (split,))


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files, by their paths in a folder, and their targets."""

    folder: str
    files: FileNames
    targets: np.ndarray
    class_names: tuple[str, ...]
    reading: Reading = AS_IT_IS
    groups: np.ndarray | None = None
    """int (images,): what must not be divided between training and evaluation."""
    folds: np.ndarray | None = None
    """int (images,): the fold of each image, from 0 on."""
    weights: np.ndarray | None = None
    """float32 (images,): how often each is drawn in training, relative to the others."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Pixels, Target]:
        return self.read(index)

    def read(
        self, index: int, channels: int | None = None, at_least: tuple[int, int] | None = None
    ) -> tuple[Pixels, Target]:
        """For a model of so many channels, and at a fraction of its size; see `read_image`."""
        path = os.path.join(self.folder, self.files[index])
        pixels = read_image(path, channels, at_least=at_least, reading=self.reading)
        return pixels, target_of(self.targets, index)


def name_of(source: Source, index: int) -> str:
    """What an image is called in messages."""
    files = getattr(source, "files", None)
    return f"image {index}" if files is None else os.path.join(source.folder, files[index])


def target_of(targets: np.ndarray, index: int) -> Target:
    """One of the targets of a source."""
    return int(targets[index]) if targets.ndim == 1 else targets[index]


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some images of another source, in their order there."""

    source: Source
    indices: np.ndarray

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def targets(self) -> np.ndarray:
        return self.source.targets[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Pixels, Target]:
        return self.source[int(self.indices[index])]

    def __getattr__(self, name: str) -> Any:
        """What only some sources have: `read`, `files`, `folder` and so on."""
        if name in ("source", "indices") or name.startswith("__"):  # asked for by pickle, before there are fields
            raise AttributeError(name)
        value = getattr(self.source, name)
        if name == "read":
            return lambda index, *arguments, **options: value(int(self.indices[index]), *arguments, **options)
        if isinstance(value, FileNames):
            return value.take(self.indices)
        return value[self.indices] if name in ("groups", "folds", "weights") and value is not None else value


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Noise, without reading or decoding anything: for timing the device alone, and for trying a run out."""

    count: int
    class_names: tuple[str, ...] = tuple(str(label) for label in range(1000))

    @property
    def targets(self) -> np.ndarray:
        return np.arange(self.count, dtype=np.int32) % len(self.class_names)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        return np.random.default_rng(index).integers(0, 256, (256, 256, 3), np.uint8), index % len(self.class_names)
