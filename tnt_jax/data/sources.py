"""Index to (image, label), at random and without state: from memory, from folders, and from records."""

import dataclasses
import gzip
import pathlib
import struct
from typing import Protocol, runtime_checkable

import numpy as np

from tnt_jax.config import InputError
from tnt_jax.data.decode import decode
from tnt_jax.data.images import SUFFIXES
from tnt_jax.data.listing import FileNames, class_folders, image_names, labels_of
from tnt_jax.data.records import open_array_record, open_tfds
from tnt_jax.data.resample import Pixels


@runtime_checkable
class Source(Protocol):
    """One split of a dataset. It can be pickled, so that worker processes can read it too."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        """Image and class. Raises InputError, with the name of the image, where it cannot be read."""


def open_source(spec: str, split: str) -> Source:
    """Opens one split of `digits`, `idx:FOLDER`, `folder:PATH`, `tfds:NAME`, `array_record:PATH`, `synthetic[:COUNT]`.

    Args:
        spec: `name` or `name:argument`.
        split: "train" or "test"; what else there is depends on the source. "test" is the validation split where there
            is no test split.

    Raises:
        InputError: an unknown source or split, or files that are missing or damaged.
    """
    name, _, argument = spec.partition(":")
    if name not in SOURCES or (name != "synthetic" and bool(argument) != (name != "digits")):
        raise InputError(
            f"data source {spec!r} is none of digits, idx:FOLDER, folder:PATH, tfds:NAME, array_record:PATH, "
            "synthetic, synthetic:COUNT"
        )
    return SOURCES[name](argument, split) if argument else SOURCES[name](split)


def _no_split(split: str, there_are) -> InputError:
    return InputError(f"there is no split {split!r}; there are {', '.join(map(repr, there_are)) or 'none'}")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory, uint8 (count, height, width, channels), and their classes."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def _digits(split: str) -> ArraySource:
    """The 1,797 scans of 8x8 pixels that scikit-learn ships, as dark ink on white paper.

    1,437 to train, 360 to test.
    """
    if split not in ("train", "test"):
        raise _no_split(split, ("train", "test"))
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    ink = scans.images / 16  # 0 is paper, 16 is the most ink
    images = np.round(255 * (1 - ink)).astype(np.uint8)[..., None]
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=scans.target, random_state=0)
    chosen = train if split == "train" else test
    return ArraySource(images[chosen], scans.target[chosen], tuple(str(name) for name in scans.target_names))


IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def _idx(argument: str, split: str) -> ArraySource:
    """MNIST's format: the four published files, gzipped or not.

    Classes of Fashion-MNIST get their names from the folder's.
    """
    if split not in IDX_FILES:
        raise _no_split(split, IDX_FILES)
    folder = pathlib.Path(argument)
    images, labels = (_read_idx(folder, name) for name in IDX_FILES[split])
    if not len(images):
        raise InputError(f"{folder} ({split}) has no images")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(f"{folder} ({split}): {images.shape} images and {labels.shape} labels do not belong together")
    if "fashion" in folder.resolve().name.lower():
        class_names = FASHION_MNIST_CLASSES
    else:  # those of the training images, whatever classes the test images happen to have
        train = _read_idx(folder, IDX_FILES["train"][1]) if split != "train" and _has_train(folder) else labels
        class_names = tuple(str(label) for label in range(int(train.max()) + 1 if len(train) else 0))
    if labels.max() >= len(class_names):
        raise InputError(
            f"{folder} ({split}): label {labels.max()} is out of range, there are {len(class_names)} classes"
        )
    return ArraySource(images[..., None], labels.astype(np.int64), class_names)


def _has_train(folder: pathlib.Path) -> bool:
    name = IDX_FILES["train"][1]
    return (folder / name).is_file() or (folder / f"{name}.gz").is_file()


def _read_idx(folder: pathlib.Path, name: str) -> np.ndarray:
    """One IDX file: two zero bytes, the type (8.

    Unsigned byte), the number of axes, their big-endian sizes, the bytes.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            break
    else:
        raise InputError(f"{folder} holds neither {name} nor {name}.gz, which an idx source reads")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{axes}I", content, 4)
        if (zeros, kind) != (0, 8):
            raise ValueError("its header is not that of unsigned bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise InputError(f"{path} is not an IDX file, or is damaged: {error}") from error


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files below a folder, by their paths in it, and their classes."""

    folder: str
    files: FileNames
    labels: np.ndarray
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
        return decode(content, path, at_least), int(self.labels[index])


SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "validation"), "validation": ("validation", "val")}
LABEL_FILE = "labels.txt"


def _folder(argument: str, split: str) -> FolderSource:
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
        raise _no_split(split, sorted(path.name for path in root.iterdir() if path.is_dir()))
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


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Noise, without reading or decoding anything: for timing the device alone, and for trying a run out."""

    count: int
    class_names: tuple[str, ...] = tuple(str(label) for label in range(1000))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        return np.random.default_rng(index).integers(0, 256, (256, 256, 3), np.uint8), index % len(self.class_names)


def _synthetic(*arguments: str) -> SyntheticSource:
    """As many images and classes as ImageNet has, or `synthetic:COUNT` images in either split."""
    *count, split = arguments
    counts = {"train": 1_281_167, "test": 50_000}
    if split not in counts:
        raise _no_split(split, counts)
    if count and not count[0].isdecimal():
        raise InputError(f"data source synthetic:{count[0]} is not synthetic:COUNT with a number of images")
    return SyntheticSource(int(count[0]) if count else counts[split])


SOURCES = {
    "digits": _digits,
    "idx": _idx,
    "folder": _folder,
    "tfds": open_tfds,
    "array_record": open_array_record,
    "synthetic": _synthetic,
}
