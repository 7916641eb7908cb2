"""Images in files of NumPy: a folder of `.npy`, or an `.npz`."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.classes import read_class_names
from tnt_jax.data.columns import Column, LazyColumns, column_of
from tnt_jax.data.decode import Reading
from tnt_jax.data.sources import Images, NoSplitError, Split, names_of_split
from tnt_jax.data.tables import Table, told_of_rows, values_of
from tnt_jax.tasks.table import TASKS

IMAGES = ("{}_images", "images_{}", "x_{}", "X_{}", "{}_x", "{}/images")
LABELS = ("{}_labels", "labels_{}", "y_{}", "Y_{}", "{}_y", "{}/labels")


class MappedArray:
    """An array in a file, of which only what is asked for is read. Another process opens the file for itself."""

    def __init__(self, path: str):
        self._path = path
        self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __reduce__(self):
        return MappedArray, (self._path,)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._array[index])


@dataclasses.dataclass(frozen=True)
class NumpyImages(Images):
    """Images (images, height, width[, channels]) of any type."""

    title: str
    arrays: np.ndarray | MappedArray

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.arrays[index]

    def name(self, index: int) -> str:
        return f"image {index} of {self.title}"


def open_numpy(argument: str, data: DataConfig, split: str) -> Split:
    """`train_images` and `train_labels` (or `x_train`, `y_train`) as arrays of an `.npz`, or as `.npy` in a folder.

    `train_group`, `train_fold` and `train_weight` are what a table has in such columns, and have other names where
    `data.group_column` and so on say them. Arrays of a folder are not read into memory. Labels are whole numbers
    (images,); with multi_label 0 or 1, and with regression numbers, (images, outputs). Classes are called by their
    numbers, or as `data.class_names` says.

    Raises:
        InputError: there is no such file, split or array, or the arrays do not belong together.
    """
    arrays = _arrays(pathlib.Path(argument))
    for name in names_of_split(split):
        images, labels = (_find(arrays, forms, name) for forms in (IMAGES, LABELS))
        if images and labels:
            break
        if images or labels:
            there, other = (images, LABELS) if images else (labels, IMAGES)
            raise InputError(f"{argument} has {there}, and no {other[0].format(name)} or {other[2].format(name)}")
    else:
        raise NoSplitError(split, _splits(arrays))
    pixels = arrays[images]
    targets = TASKS[data.task].labels_of_array(np.asarray(arrays[labels][...]), labels, argument)
    if len(pixels.shape) not in (3, 4) or len(pixels) != len(targets) or not len(targets):
        raise InputError(
            f"{argument} ({split}): {images} {pixels.shape} and {labels} {targets.shape} do not belong together; "
            "images are (images, height, width[, channels])"
        )
    class_names = _class_names(arrays, targets, data, argument)
    table = _told_of_images(arrays, name, len(targets), f"{argument} ({name})")
    told = values_of(table, told_of_rows(table, data), np.arange(len(targets)))
    images = NumpyImages(f"{argument} ({images})", pixels)
    return Split(images, targets, class_names, name, Reading.of(data), **told)


def _told_of_images(arrays: Mapping[str, Any], split: str, count: int, title: str) -> Table:
    """The other columns of a split's images: `train_patient`, `patient_train` or `train/patient` is `patient`."""
    forms = (rf"{split}[_/](.+)", rf"(.+)_{split}")
    found = {each[1]: key for key in arrays for form in forms if (each := re.fullmatch(form, key))}

    def column(name: str) -> Column:
        import pyarrow

        values = np.asarray(arrays[found[name]][...])
        if values.shape != (count,):
            raise InputError(f"{title}: {found[name]} is {values.shape}, and should have a value for each image")
        return column_of(name, pyarrow.chunked_array([pyarrow.array(values)]))

    return Table(title, LazyColumns(tuple(found), column), count)


class _Folder(Mapping):
    """The arrays below a folder by their paths, opened when they are asked for."""

    def __init__(self, folder: pathlib.Path):
        self._paths = {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.glob("**/*.npy"))}

    def __getitem__(self, name: str) -> MappedArray:
        try:
            return MappedArray(str(self._paths[name]))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{self._paths[name]} cannot be read as an array: {error}") from error

    def __iter__(self):
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _arrays(path: pathlib.Path) -> Mapping[str, Any]:
    if path.is_dir():
        return _Folder(path)
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is one array; npy: reads an .npz, or the folder where images and labels lie")
        with file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(f"there is no folder and no file {path}") from None
    except Exception as error:  # of zip files, of compressions, of headers
        raise InputError(f"{path} cannot be read as an .npz: {error}") from error


def _find(arrays: Mapping[str, Any], forms: tuple[str, ...], split: str) -> str | None:
    return next((form.format(split) for form in forms if form.format(split) in arrays), None)


def _splits(arrays: Mapping[str, Any]) -> list[str]:
    return [name for name in ("train", "val", "valid", "validation", "test") if _find(arrays, IMAGES, name)]


def _class_names(arrays: Mapping[str, Any], targets: np.ndarray, data: DataConfig, argument: str) -> tuple[str, ...]:
    if targets.ndim == 2:
        count = targets.shape[1]
    else:
        training = next(
            (_find(arrays, LABELS, name) for name in names_of_split(data.train_split) if _find(arrays, LABELS, name)),
            None,
        )
        count = int(np.max(arrays[training][...] if training else targets)) + 1
    names = read_class_names(data.class_names) if data.class_names else tuple(map(str, range(count)))
    if len(names) < count or (targets.ndim == 2 and len(names) != count):
        raise InputError(f"{argument} has {count} classes, and {data.class_names} names {len(names)}")
    if targets.ndim == 1 and targets.max() >= len(names):
        raise InputError(
            f"{argument}: label {targets.max()} is out of range, the training images have {len(names)} classes"
        )
    return names
