"""Datasets of the Hugging Face hub, or of a folder, through the library `datasets`."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.columns import LABEL_COLUMNS, SEPARATORS, class_names_of
from tnt_jax.data.decode import Reading, read_image
from tnt_jax.data.samples import Pixels
from tnt_jax.data.sources import NoSplitError, Target, names_of_split, target_of
from tnt_jax.data.tables import IMAGE_COLUMNS

INSTALL = "pip install 'datasets>=5.2,<6'"


@dataclasses.dataclass(frozen=True)
class HubSource:
    """One split of a dataset, whose rows stay in its Arrow files."""

    name: str
    rows: Any  # datasets.Dataset, with images as the bytes or the path of a file
    image: str
    targets: np.ndarray
    class_names: tuple[str, ...]
    reading: Reading

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Pixels, Target]:
        return self.read(index)

    def read(
        self, index: int, channels: int | None = None, at_least: tuple[int, int] | None = None
    ) -> tuple[Pixels, Target]:
        """For a model of so many channels, and at a fraction of its size; see `read_image`."""
        name = f"row {index} of {self.name}"
        try:
            cell = self.rows[index][self.image]
        except Exception as error:  # a damaged file raises nearly everything
            raise InputError(f"{name} cannot be read: {error}") from error
        if isinstance(cell, dict):
            name += f" ({os.path.basename(cell['path'])})" if cell.get("path") else ""
            cell = cell["bytes"] if cell.get("bytes") is not None else cell["path"]
        cell = np.asarray(cell) if isinstance(cell, list) else cell
        if cell is None:
            raise InputError(f"{name} has no image")
        pixels = read_image(cell, channels, at_least=at_least, reading=self.reading, name=name)
        return pixels, target_of(self.targets, index)


def open_hub_dataset(argument: str, data: DataConfig, split: str) -> HubSource:
    """`hf:OWNER/NAME` of the hub, or a folder: one that `save_to_disk` wrote, or one of data files or images.

    Raises:
        InputError: there is no such dataset, split or column, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"hf: needs {error.name}, which is not installed: {INSTALL}") from error
    datasets.disable_progress_bars()
    splits = _load(datasets, argument)
    name = next((name for name in names_of_split(split) if name in splits), None)
    if name is None:
        raise NoSplitError(split, splits)
    rows = splits[name]
    image = _image_column(datasets, rows, data, argument)
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    training = next((splits[each] for each in names_of_split(data.train_split) if each in splits), rows)
    targets, class_names = _targets(datasets, rows, training, data, f"hf:{argument} {name}")
    return HubSource(f"hf:{argument} {name}", rows, image, targets, class_names, Reading.of(data))


def _load(datasets, argument: str) -> dict[str, Any]:
    folder = pathlib.Path(argument)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(argument)
            return loaded if isinstance(loaded, dict) else {"train": loaded}
        return datasets.load_dataset(argument)
    except Exception as error:  # of the network, of damaged files, of unknown formats
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"hf:{argument} cannot be opened: {reason}") from error


def _image_column(datasets, rows, data: DataConfig, argument: str) -> str:
    if data.image_column is not None:
        if data.image_column in rows.features:
            return data.image_column
    else:
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        images += [name for name in IMAGE_COLUMNS if name in rows.features]
        if images:
            return images[0]
    raise InputError(
        f"hf:{argument} has no column {data.image_column or 'image'!r}; it has {', '.join(rows.features)}: name one of "
        "them with --data.image-column"
    )


def _targets(datasets, rows, training, data: DataConfig, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Targets of all rows, and what the classes or numbers are called, as the training rows have them."""
    columns = _label_columns(rows, data, name)
    if data.task == "regression" or len(columns) > 1:
        return _numbers(rows, columns, data, name), tuple(columns)
    (column,) = columns
    cells = _labels(rows, column, data, name)
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)  # of what a list holds
    if isinstance(feature, datasets.ClassLabel):
        class_names = tuple(feature.names)
        numbers = {number: number for number in range(len(class_names))}
    else:
        trained = cells if training is rows else _labels(training, column, data, name)
        class_names = class_names_of(data, {str(label) for cell in trained for label in cell})
        numbers = {label: number for number, label in enumerate(class_names)}
        cells = [[str(label) for label in cell] for cell in cells]
    targets = np.zeros((len(cells), len(class_names)), np.float32)
    for row, cell in enumerate(cells):
        for label in cell:
            if label not in numbers:
                raise InputError(f"{name}, row {row}: label {label!r} is none of the {len(class_names)} classes")
            targets[row, numbers[label]] = 1
    if data.task == "multi_label":
        return targets, class_names
    return targets.argmax(axis=1).astype(np.int32), class_names


def _label_columns(rows, data: DataConfig, name: str) -> list[str]:
    usual = ("target", "targets", "value", "label") if data.task == "regression" else LABEL_COLUMNS
    columns = list(data.label_columns) or [each for each in usual if each in rows.features][:1]
    if not columns or not set(columns) <= set(rows.features):
        lacking = next((each for each in columns if each not in rows.features), "label")
        raise InputError(
            f"{name} has no column {lacking!r}; it has {', '.join(rows.features)}: name one of them with "
            "--data.label-columns"
        )
    return columns


def _numbers(rows, columns: list[str], data: DataConfig, name: str) -> np.ndarray:
    """A column for each number or label, float32 (rows, columns)."""
    if data.task == "single_label":
        raise InputError(f"{name}: {len(columns)} columns of labels fit multi_label and regression alone")
    targets = np.stack([np.asarray(rows.with_format(None)[each][:], np.float32) for each in columns], axis=1)
    if not np.isfinite(targets).all():
        row = int(np.argwhere(~np.isfinite(targets))[0, 0])
        raise InputError(f"{name}, row {row}: {', '.join(columns)} has no finite number")
    if data.task == "multi_label" and not np.isin(targets, (0, 1)).all():
        raise InputError(f"{name}: {', '.join(columns)} should be 0 or 1")
    return targets


def _labels(rows, column: str, data: DataConfig, name: str) -> list[list]:
    """The labels of each row: of a single label one, of several those of a list or of a text with separators."""
    cells = rows[column][:]
    several = isinstance(cells[0], list)
    if several == (data.task == "multi_label"):
        return cells if several else [[cell] for cell in cells]
    if several or not isinstance(cells[0], str):
        fitting = "multi_label" if several else "single_label"
        raise InputError(f"{name}: column {column!r} fits --data.task {fitting}, and not {data.task}")
    separator = data.label_separator or next((each for each in SEPARATORS if any(each in c for c in cells)), "|")
    return [[label.strip() for label in cell.split(separator) if label.strip()] for cell in cells]
