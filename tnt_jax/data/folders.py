"""Folders of images: a folder per split, in it a folder per class."""

import dataclasses
import pathlib

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.decode import decode
from tnt_jax.data.images import SUFFIXES
from tnt_jax.data.listing import FileNames, class_folders, image_names, labels_of
from tnt_jax.data.resample import Pixels
from tnt_jax.data.sources import NoSplitError


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files below a folder, by their paths in it, and their classes."""

    folder: str
    files: FileNames
    targets: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        return self.read(index)

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> tuple[Pixels, int]:
        """With `at_least`, large images come at a fraction of their size; see `decode`."""
        path = f"{self.folder}/{self.files[index]}"
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        return decode(content, path, at_least), int(self.targets[index])


SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "validation"), "validation": ("validation", "val")}
LABEL_FILE = "labels.txt"


def open_folder(argument: str, data: DataConfig, split: str) -> FolderSource:
    """A folder per split, in it a folder per class, in it images, nested or not. Classes are sorted by name.

    A split may also hold its images flat, beside a `labels.txt` that names the class of each, a line for an image, in
    the order of their names: so ImageNet ships its validation images. The classes are those of the training images.
    """
    root = pathlib.Path(argument)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    names = SPLIT_NAMES.get(split, (split,))
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise NoSplitError(split, sorted(path.name for path in root.iterdir() if path.is_dir()))
    class_names = class_folders(root / "train" if (root / "train").is_dir() else folder)
    if (folder / LABEL_FILE).is_file():
        files = FileNames([("", image_names(folder))])
        labels = _read_labels(folder / LABEL_FILE, len(files), class_names)
        return FolderSource(str(folder), files, labels, class_names)
    differing = sorted(set(class_names) ^ set(class_folders(folder)))
    if differing or not class_names:
        raise InputError(
            f"{folder} and {root / 'train'} do not have the same class folders: {', '.join(differing[:5])}"
            if class_names
            else f"{folder} holds neither class folders nor a {LABEL_FILE}"
        )
    counts = []

    def images_of_class(name: str) -> tuple[str, list[str]]:
        found = image_names(folder / name)
        if not found:
            raise InputError(f"class folder {folder / name} holds no image; known are {', '.join(SUFFIXES)}")
        counts.append(len(found))
        return name, found

    files = FileNames(map(images_of_class, class_names))
    return FolderSource(str(folder), files, labels_of(counts, range(len(class_names))), class_names)


def _read_labels(path: pathlib.Path, count: int, class_names: tuple[str, ...]) -> np.ndarray:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a list of class names: {error}") from error
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [line for line in lines if line not in numbers]
    if unknown:
        raise InputError(f"{path} names the class {unknown[0]!r}, which is none of the {len(numbers)} class folders")
    if len(lines) != count:
        raise InputError(f"{path} has {len(lines)} lines, and {count} images lie beside it")
    return np.array([numbers[line] for line in lines], np.int32)
