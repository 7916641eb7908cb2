"""Index to (image, label), at random and without state: digits and IDX files."""

import dataclasses
import gzip
import pathlib
import struct

import numpy as np

from tnt_jax.config import InputError

SPLITS = ("train", "test")


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


def open_source(spec: str, split: str) -> ArraySource:
    """Opens `name` or `name:argument` and returns one split, "train" or "test".

    Raises:
        InputError: an unknown source, or files that are missing or damaged.
    """
    name, _, argument = spec.partition(":")
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; the splits are {' and '.join(SPLITS)}")
    if name == "digits" and not argument:
        return _digits(split)
    if name == "idx" and argument:
        return _idx(pathlib.Path(argument), split)
    raise InputError(f"data source {spec!r} is none of digits, idx:FOLDER")


def _digits(split: str) -> ArraySource:
    """The 1,797 scans of 8x8 pixels that scikit-learn ships, as dark ink on white paper, 1,437 for training."""
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


def _idx(folder: pathlib.Path, split: str) -> ArraySource:
    """MNIST's format: the four published files, gzipped or not.

    Classes of Fashion-MNIST get their names from the folder's.
    """
    images, labels = (_read_idx(folder, name) for name in IDX_FILES[split])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(f"{folder} ({split}): {images.shape} images and {labels.shape} labels do not belong together")
    if "fashion" in folder.resolve().name.lower():
        class_names = FASHION_MNIST_CLASSES
    else:
        class_names = tuple(str(label) for label in range(int(labels.max()) + 1))
    return ArraySource(images[..., None], labels.astype(np.int64), class_names)


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
