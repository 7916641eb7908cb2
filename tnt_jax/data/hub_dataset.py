"""Datasets of the Hugging Face hub, or of a folder, through the library `datasets`."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.columns import Column, LazyColumns, column_of, is_label
from tnt_jax.data.sources import Images, NoSplitError, Split, names_of_split
from tnt_jax.data.tables import IMAGE_COLUMNS, Table, split_of_rows

INSTALL = "pip install 'datasets>=5.2,<6'"


@dataclasses.dataclass(frozen=True)
class HubImages(Images):
    """The images of a dataset, whose rows stay in its Arrow files."""

    title: str
    rows: Any  # datasets.Dataset, with images as the bytes or the path of a file
    column: str
    dtype: str | None = None
    """Of arrays, which come as lists."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes | str | np.ndarray:
        try:
            cell = self.rows[index][self.column]
        except Exception as error:  # a damaged file raises nearly everything
            raise InputError(f"row {index} of {self.title} cannot be read: {error}") from error
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") is not None else cell["path"]
        if cell is None:
            raise InputError(f"{self.name(index)} has no image")
        return np.asarray(cell, self.dtype) if isinstance(cell, list) else cell

    def name(self, index: int) -> str:
        cell = self.rows[index][self.column]
        path = cell.get("path") if isinstance(cell, dict) else None
        return f"row {index} of {self.title}" + (f" ({os.path.basename(path)})" if path else "")


@dataclasses.dataclass(frozen=True)
class _Rows(Table):
    """The rows of several splits, one after another."""

    splits: dict[str, Any] = dataclasses.field(default_factory=dict)

    def first(self, split: str) -> int:
        """The first row of a split."""
        return sum(len(rows) for rows in list(self.splits.values())[: list(self.splits).index(split)])

    def rows_of(self, split: str) -> np.ndarray:
        return self.first(split) + np.arange(len(self.splits[split]))

    def place(self, row: int) -> str:
        split = next(name for name in reversed(self.splits) if row >= self.first(name))
        return f"{self.path} {split}, row {row - self.first(split)}"


def open_hub_dataset(argument: str, data: DataConfig, split: str) -> Split:
    """`hf:OWNER/NAME` of the hub, or a folder: one that `save_to_disk` wrote, or one of data files or images.

    Raises:
        InputError: there is no such dataset, split or column, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"hf: needs {error.name}, which is not installed: {INSTALL}") from error
    splits = _load(datasets, argument)

    def known(split: str) -> str | None:
        return next((name for name in names_of_split(split) if name in splits), None)

    name = known(split)
    if name is None:
        raise NoSplitError(split, splits)
    rows = splits[name]
    image = _image_column(datasets, rows, data, argument)
    training = known(data.train_split) or name
    # Where other classes are allowed they are those of all splits that are evaluated, whichever is opened.
    others = (data.eval_split or "validation", "test") if data.other_classes else ()
    used = [each for each in dict.fromkeys((training, name, *map(known, others))) if each]
    table = _table(datasets, {each: splits[each] for each in used}, f"hf:{argument}")
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    rows = rows.select_columns([image])  # or a row would be read and decoded whole
    feature = rows.features[image]
    arrays = datasets.Array2D | datasets.Array3D
    images = HubImages(f"hf:{argument} {name}", rows, image, feature.dtype if isinstance(feature, arrays) else None)
    return split_of_rows(table, data, images, table.rows_of(name), table.rows_of(training), name, {image})


def _table(datasets, splits: dict[str, Any], name: str) -> _Rows:
    """The labels of the images of some splits, each column read when it is asked for."""
    import pyarrow as pa

    features = next(iter(splits.values())).features
    types = {field.name: field.type for field in features.arrow_schema}

    def column(name: str) -> Column:
        chunks = [rows.select_columns([name]).with_format("arrow")[:][name] for rows in splits.values()]
        values = pa.chunked_array([chunk for each in chunks for chunk in each.chunks], types[name])
        feature = getattr(features[name], "feature", features[name])  # of what a list holds
        declared = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        return column_of(name, values, declared)

    names = tuple(name for name, kind in types.items() if is_label(kind))
    return _Rows(name, LazyColumns(names, functools.cache(column)), sum(map(len, splits.values())), splits=splits)


def _load(datasets, argument: str) -> dict[str, Any]:
    folder = pathlib.Path(argument)
    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(argument)
            return loaded if isinstance(loaded, dict) else {"train": loaded}
        return datasets.load_dataset(argument)
    except Exception as error:  # of the network, of damaged files, of unknown formats
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"hf:{argument} cannot be opened: {reason}") from error
    finally:
        if shows_bars:
            datasets.enable_progress_bars()


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
