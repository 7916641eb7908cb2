"""MNIST's format."""

import gzip
import pathlib
import struct

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.classes import read_class_names
from tnt_jax.data.decode import Reading
from tnt_jax.data.sources import NoSplitError, Split

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def open_idx(argument: str, data: DataConfig, split: str) -> Split:
    """MNIST's format: the four published files, gzipped or not.

    Classes have the names of `data.class_names`; those of Fashion-MNIST get theirs from the folder's.
    """
    if split not in IDX_FILES:
        raise NoSplitError(split, IDX_FILES)
    folder = pathlib.Path(argument).expanduser()
    images, labels = (_read_idx(folder, name) for name in IDX_FILES[split])
    if not len(images):
        raise InputError(f"{folder} ({split}) has no images")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(f"{folder} ({split}): {images.shape} images and {labels.shape} labels do not belong together")
    if data.class_names:
        class_names = read_class_names(data.class_names)
    elif "fashion" in "/".join(folder.resolve().parts[-2:]).lower():
        class_names = FASHION_MNIST_CLASSES
    else:  # those of the training images, whatever classes the test images happen to have
        train = _read_idx(folder, IDX_FILES["train"][1]) if split != "train" and _has_train(folder) else labels
        class_names = tuple(str(label) for label in range(int(train.max()) + 1 if len(train) else 0))
    if labels.max() >= len(class_names):
        raise InputError(
            f"{folder} ({split}): label {labels.max()} is out of range, there are {len(class_names)} classes"
        )
    return Split(images[..., None], labels.astype(np.int64), class_names, split, Reading.of(data))


def _has_train(folder: pathlib.Path) -> bool:
    return any(path.is_file() for path in _paths(folder, IDX_FILES["train"][1]))


def _paths(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The paths of a file: as published, or with Kaggle's dot, gzipped or not, here or in torchvision's `raw`."""
    names = [name, name.replace("-idx", ".idx")]
    return [place / f"{each}{suffix}" for place in (folder, folder / "raw") for each in names for suffix in ("", ".gz")]


def _read_idx(folder: pathlib.Path, name: str) -> np.ndarray:
    """One IDX file: two zero bytes, the type (8: unsigned byte), the number of axes, big-endian sizes, the bytes."""
    for path in _paths(folder, name):
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
