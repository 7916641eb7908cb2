"""The names of many files in little memory: two dozen bytes for an image of ImageNet-21k."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tnt_jax.data.images import SUFFIXES


class FileNames(Sequence):
    """Paths in a folder, one below each of its subfolders after another, as few arrays.

    A list of strings takes four times the memory and is copied to every worker process, where arrays are shared.

    Args:
        by_folder: subfolders (empty for the folder itself) and the paths of the files in each.
    """

    def __init__(self, by_folder: Iterable[tuple[str, Iterable[str]]]):
        text, ends, folders, counts = bytearray(), [np.zeros(1, np.int64)], [], []
        for folder, names in by_folder:
            encoded = [os.fsencode(name) for name in names]
            ends.append(len(text) + np.cumsum([len(name) for name in encoded], dtype=np.int64))
            text += b"".join(encoded)
            folders.append(folder)
            counts.append(len(encoded))
        ends = np.concatenate(ends)
        self._text = np.frombuffer(text, np.uint8)
        self._ends = ends.astype(np.uint32) if len(text) < 2**32 else ends
        self._folders = tuple(folders)
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        folder = self._folders[np.searchsorted(self._starts, index, "right") - 1]
        name = os.fsdecode(self._text[int(self._ends[index]) : int(self._ends[index + 1])].tobytes())
        return f"{folder}/{name}" if folder else name

    def take(self, indices: np.ndarray) -> "FileNames":
        """Some of the files, in this order."""
        chosen = FileNames([("", [self[int(index)] for index in indices])])
        return chosen

    def digest(self) -> str:
        """A checksum of all names and their order."""
        hashed = hashlib.sha256(repr((self._folders, self._starts.tolist())).encode(errors="surrogateescape"))
        hashed.update(self._text)
        hashed.update(self._ends.astype("<i8"))
        return hashed.hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._text.nbytes + self._ends.nbytes + self._starts.nbytes


def labels_of(counts: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    """Each label as many times as its count says, in the smallest type that holds all of them."""
    smallest = np.min_scalar_type(max(labels, default=0))
    return np.repeat(np.asarray(labels, smallest), counts)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def image_names(folder: Path) -> list[str]:
    """Paths, in `folder`, of all images below it, sorted. Links are followed, to every folder once."""
    found, seen = [], set()
    for place, subfolders, names in os.walk(folder, followlinks=True):
        identity = os.stat(place)
        if (identity.st_dev, identity.st_ino) in seen:  # a link to where the walk has been
            subfolders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        subfolders.sort()
        below = os.path.relpath(place, folder)
        images = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        found += images if below == "." else [f"{below}/{name}" for name in images]
    return sorted(found)
