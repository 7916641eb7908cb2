"""The images of a folder, by one walk in one order, and the names of many files in little memory."""

import collections
import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tnt_jax.config import InputError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".npy",
)  # fmt: skip
"""By which files are taken for images; what they are, their content says."""
Identity = tuple[int, int]  # device and inode


class FileNames(Sequence):
    """Paths in a folder, one below each of its subfolders after another, as few arrays.

    A list of strings takes four times the memory and is copied to every worker process, where arrays are shared.

    Args:
        by_folder: subfolders (empty for the folder itself) and the paths of the files in each, as text or bytes.
    """

    def __init__(self, by_folder: Iterable[tuple[str, Iterable[str | bytes]]]):
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
        self._chosen: np.ndarray | None = None

    @classmethod
    def of_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "FileNames":
        """From all paths in one array of bytes, and where each ends, beginning with 0."""
        made = cls([])
        made._text, made._ends = text, ends.astype(np.uint32) if len(text) < 2**32 else ends
        made._folders, made._starts = ("",), np.array([0, len(ends) - 1])
        return made

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        index = index if self._chosen is None else int(self._chosen[index])
        folder = self._folders[np.searchsorted(self._starts, index, "right") - 1]
        name = os.fsdecode(self._text[int(self._ends[index]) : int(self._ends[index + 1])].tobytes())
        return f"{folder}/{name}" if folder else name

    def take(self, indices: np.ndarray) -> "FileNames":
        """Some of the files, in this order. They share the text."""
        taken = object.__new__(FileNames)
        taken.__dict__ |= self.__dict__
        taken._chosen = (np.asarray(indices) if self._chosen is None else self._chosen[indices]).astype(np.int32)
        return taken

    def digest(self) -> str:
        """A checksum of all names and their order."""
        hashed = hashlib.sha256(repr((self._folders, self._starts.tolist())).encode(errors="surrogateescape"))
        hashed.update(self._text)
        hashed.update(self._ends.astype("<i8"))
        if self._chosen is not None:
            hashed.update(self._chosen.astype("<i8"))
        return hashed.hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        chosen = 0 if self._chosen is None else self._chosen.nbytes
        return self._text.nbytes + self._ends.nbytes + self._starts.nbytes + chosen


def labels_of(counts: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    """Each label as many times as its count says, in the smallest type that holds all of them."""
    smallest = np.min_scalar_type(max(labels, default=0))
    return np.repeat(np.asarray(labels, smallest), counts)


def natural_key(name: str) -> tuple[list, str]:
    """Sorts `b2` before `b10`: the order of classes and of files, everywhere."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


@dataclasses.dataclass
class Walk:
    """Walks through folders, through each once: links are followed, by device and inode.

    Hidden files and folders are no images. Folders and files come in natural order, and what was left out is counted.
    """

    seen: set[Identity] = dataclasses.field(default_factory=set)
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    """Files that are no images, by their suffix."""
    broken: list[str] = dataclasses.field(default_factory=list)
    """Links that lead nowhere. They are given as images, so that whoever reads them is told."""

    def __call__(self, folder: str, below: str = "") -> Iterator[str]:
        """Paths of the images in a folder and the folders in it, relative to it, as they are asked for."""
        place = os.path.join(folder, below) if below else folder
        try:
            self.seen.add(identity_of(os.stat(place)))
            with os.scandir(place) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise InputError(f"folder {place} cannot be read: {error.strerror}") from error
        for entry in sorted(found, key=lambda entry: natural_key(entry.name)):
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.is_symlink():
                try:
                    known = os.stat(entry.path)
                except OSError:
                    if entry.name.lower().endswith(SUFFIXES):
                        self.broken.append(path)
                        yield path
                    continue
                is_folder = stat.S_ISDIR(known.st_mode)
                if is_folder and identity_of(known) in self.seen:
                    continue
            else:
                is_folder = entry.is_dir()
            if is_folder:
                if entry.is_symlink() or identity_of(os.stat(entry.path)) not in self.seen:
                    yield from self(folder, path)
            elif entry.name.lower().endswith(SUFFIXES):
                yield path
            else:
                self.left_out[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1

    def what_was_left_out(self) -> str | None:
        """In words, such as `3 .txt, 1 .mp4`."""
        return ", ".join(f"{count} {suffix}" for suffix, count in self.left_out.most_common()) or None


def identity_of(known: os.stat_result) -> Identity:
    """Device and inode."""
    return known.st_dev, known.st_ino


def folders_in(folder: str | os.PathLike) -> tuple[str, ...]:
    """Names of the folders in a folder, in natural order, without hidden ones."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return tuple(sorted(names, key=natural_key))


def images_below(folder: str | os.PathLike, walk: Walk | None = None) -> Iterator[str]:
    """The paths of all images in a folder and the folders in it, by their suffix, as they are asked for.

    One folder at a time is listed, so that the first image of millions is there as soon as its own folder has been
    read.

    Raises:
        InputError: there is no such folder; or, at the end, no image was in it.
    """
    folder, walk = os.path.expanduser(os.fspath(folder)), walk or Walk()
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {folder}")
    found = False
    for path in walk(folder):
        found = True
        yield os.path.join(folder, path)
    if not found:
        others = walk.what_was_left_out()
        raise InputError(
            f"there is no image in {folder}; known are {', '.join(SUFFIXES)}" + (f"; it has {others}" if others else "")
        )
