"""Columns of a table to targets: one class, several classes, or numbers for each row."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.listing import FileNames, natural_key
from tnt_jax.tasks.table import TASKS

if TYPE_CHECKING:
    import pyarrow

    from tnt_jax.data.tables import Table

MARKS = {b"0", b"1", b"0.0", b"1.0", b"true", b"false"}
LIST_SEPARATOR = "\x1f"
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
SEPARATORS = "|;,"
logger = logging.getLogger(__name__)


PART = 1 << 14  # values that are Python's objects at a time


@dataclasses.dataclass(frozen=True)
class Column:
    """The cells of a column, as bytes."""

    name: str
    cells: "pyarrow.BinaryArray"
    empty: int | None = None
    """The first row without a value, where that is something else than an empty text."""
    separator: str | None = None
    """The separator of the labels of a cell, where the column holds lists."""
    declared: tuple[str, ...] | None = None
    """Names of the classes, of which the cells have the numbers."""

    @functools.cached_property
    def _encoded(self) -> "pyarrow.DictionaryArray":
        return self.cells.dictionary_encode()

    @property
    def values(self) -> "pyarrow.BinaryArray":
        """The different cells, in the order in which they come."""
        return self._encoded.dictionary

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """The value that each row has, int32 (rows,)."""
        return np.asarray(self._encoded.indices, np.int32)

    @property
    def texts(self) -> list[str]:
        """The different cells as text."""
        return [os.fsdecode(value).strip() for value in parts(self.values)]

    def text_of(self, row: int) -> str:
        """The cell of a row as text."""
        return os.fsdecode(self.cells[row].as_py()).strip()

    def first_row(self, code: int) -> int:
        """The first row that has a value, by its number."""
        return int(np.argmax(self.codes == code))

    def empty_row(self) -> int | None:
        """The first row whose cell is empty."""
        return next((row for row, cell in enumerate(parts(self.cells)) if not cell.strip()), None)

    def files_of(self, rows: np.ndarray) -> FileNames:
        """The cells of some rows as names of files."""
        taken = self.cells if len(rows) == len(self.cells) else self.cells.take(rows)
        _, ends, text = taken.buffers()
        ends = np.frombuffer(ends, np.int32, len(taken) + 1, taken.offset * 4)
        return FileNames.of_arrays(np.frombuffer(text or b"", np.uint8)[: ends[-1]], ends)

    def numbers(self, in_order: bool = False) -> np.ndarray:
        """A number for each row, int32 (rows,): the same where its text is the same but for blanks around it.

        Args:
            in_order: number the texts in their natural order; else as they come.
        """
        texts = self.texts
        different = sorted(set(texts), key=natural_key) if in_order else dict.fromkeys(texts)
        places = {text: place for place, text in enumerate(different)}
        return np.array([places[text] for text in texts], np.int32)[self.codes]


@dataclasses.dataclass(frozen=True)
class LazyColumns(Mapping):
    """Columns by their names, each made when it is asked for."""

    names: Sequence[str]
    make: Callable[[str], Column]

    def __getitem__(self, name: str) -> Column:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def column_of(name: str, values: "pyarrow.ChunkedArray", declared: tuple[str, ...] | None = None) -> Column:
    """A column of Arrow as text. NaN is no value, and a cell with a list has its parts one after another."""
    import pyarrow as pa
    from pyarrow import compute

    separator, kind = None, values.type
    if is_list(kind):
        separator = LIST_SEPARATOR
        values = values.cast(pa.list_(pa.string()))
        values = compute.binary_join(values, LIST_SEPARATOR)
    elif pa.types.is_floating(kind):
        values = compute.if_else(compute.is_nan(values), None, values)
    missing = compute.index(values.is_null(), True).as_py()
    text = values.cast(pa.string()).fill_null("").cast(pa.binary())
    return Column(name, as_one_array(text), None if missing < 0 else missing, separator, declared)


def is_list(kind: "pyarrow.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_label(kind: "pyarrow.DataType") -> bool:
    """True if a column could hold labels: texts, numbers, or lists of them."""
    import pyarrow as pa

    return not pa.types.is_nested(kind.value_type if is_list(kind) else kind) and not isinstance(
        kind, pa.BaseExtensionType
    )


def as_one_array(column: "pyarrow.ChunkedArray") -> "pyarrow.Array":
    """pyarrow's chunks as one array."""
    whole = column.combine_chunks()
    return whole.chunk(0) if hasattr(whole, "num_chunks") else whole


def parts(array: "pyarrow.BinaryArray") -> Iterator[bytes]:
    """The values of an array, a few thousand at a time."""
    for at in range(0, len(array), PART):
        yield from array.slice(at, PART).to_pylist()


def targets_of(
    table: "Table", data: DataConfig, others: set[str | None], training: np.ndarray | None
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Targets of all rows, what the classes or numbers are called, and which of the classes training rows have.

    Args:
        others: columns that are no labels.
        training: the training rows.

    Raises:
        InputError: a cell is empty, is no label or no number; the message names its line.
    """
    if training is None:
        raise InputError(f"{table.path} has no row of the training split {data.train_split!r}")
    if missing := [name for name in data.label_columns if name not in table.columns]:
        table.chosen(missing[0], (), "")
    task, labels = TASKS[data.task], Labels(table, data, training)
    columns = list(data.label_columns)
    if not columns:
        found = table.chosen(None, task.label_columns, "")
        unused = [name for name in table.columns if name not in others]
        columns = [found] if found else task.usual_columns(unused, labels)
    if not columns:
        table.chosen(None, LABEL_COLUMNS, "--data.label-columns", required=True)
    for name in columns:
        if (row := table.columns[name].empty) is not None:
            raise InputError(f"{table.place(row)}: the cell of {name!r} is empty")
    return task.labels_of_columns(columns, labels)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of a table: each way to read its columns gives the targets of all rows, what the classes or numbers
    are called, and which of them training rows have, None where these are no classes."""

    table: "Table"
    data: DataConfig
    training: np.ndarray

    @property
    def path(self) -> str:
        return self.table.path

    def texts(self, name: str) -> list[str]:
        return _texts(self.table, self.table.columns[name])

    def has_lists(self, name: str) -> bool:
        return self.table.columns[name].separator is not None

    def has_marks(self, name: str) -> bool:
        values = self.table.columns[name].values
        return len(values) <= 4 and {value.strip() for value in parts(values)} <= MARKS

    def classes(self, name: str) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        column, texts = self.table.columns[name], self.texts(name)
        names, numbers, trained = _class_names(self.table, column, [[text] for text in texts], self.data, self.training)
        if "" in texts:
            raise InputError(f"{_place(self.table, column, texts.index(''))}: the cell of {name!r} is empty")
        return np.array([numbers[text] for text in texts], np.int32)[column.codes], names, trained

    def lists(self, name: str) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        return _several(self.table, self.table.columns[name], self.texts(name), self.data, self.training)

    def marks(self, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        return self._each(_marks, names)

    def numbers(self, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        targets, names, _ = self._each(_numbers, names)
        return targets, names, None

    def _each(self, read: Callable, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        targets = np.stack([read(self.table, self.table.columns[name]) for name in names], axis=1)
        return targets, tuple(names), np.ones(len(names), bool)


def _place(table: "Table", column: Column, code: int) -> str:
    return table.place(column.first_row(code))


def _texts(table: "Table", column: Column) -> list[str]:
    """The different values of a column."""
    texts = []
    for value in parts(column.values):
        try:
            texts.append(value.decode().strip())
        except UnicodeDecodeError:
            raise InputError(
                f"{_place(table, column, len(texts))}: {value!r} in column {column.name!r} is not UTF-8; "
                "save the table as UTF-8, or name its encoding, such as --data.encoding latin-1"
            ) from None
    return texts


def _number(text: str) -> float | None:
    try:
        return float({"true": "1", "false": "0"}.get(text.lower(), text))
    except ValueError:
        return None


def _numbers(table: "Table", column: Column) -> np.ndarray:
    values = np.empty(len(column.values), np.float32)
    for code, text in enumerate(_texts(table, column)):
        number = _number(text)
        if number is None or not math.isfinite(number):
            what = "is empty" if not text else f"is {text!r}, and should be a finite number"
            raise InputError(f"{_place(table, column, code)}: the cell of {column.name!r} {what}")
        values[code] = number
    return values[column.codes]


def weights_of(table: "Table", column: Column) -> np.ndarray:
    """The frequency of each row, float32 (rows,). Raises InputError for what is no number of at least 0."""
    weights = _numbers(table, column)
    if (wrong := weights < 0).any():
        row = int(np.argmax(wrong))
        raise InputError(f"{table.place(row)}: the weight is {weights[row]:g}, and should be at least 0")
    if not weights.any():
        raise InputError(f"{table.path}: every weight in column {column.name!r} is 0, so no image is ever drawn")
    return weights


def _marks(table: "Table", column: Column) -> np.ndarray:
    values = _numbers(table, column)
    if (wrong := (values != 0) & (values != 1)).any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"{table.place(row)}: the cell of {column.name!r} is {values[row]:g}, and should be 1 where the image has "
            "the label and 0 where not"
        )
    return values


def _several(
    table: "Table", column: Column, texts: list[str], data: DataConfig, training: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Cells with any number of labels; an empty one has none."""
    separator = (
        column.separator
        or data.label_separator
        or next((each for each in SEPARATORS if any(each in text for text in texts)), "|")
    )
    if separator not in (column.separator, data.label_separator):
        logger.info("%s: labels in column %r are divided by %r", table.path, column.name, separator)
    cells = [[label.strip() for label in text.split(separator) if label.strip()] for text in texts]
    names, numbers, trained = _class_names(table, column, cells, data, training)
    targets = np.zeros((len(cells), len(names)), np.float32)
    for code, labels in enumerate(cells):
        targets[code, [numbers[label] for label in labels]] = 1
    return targets[column.codes], names, trained


def _class_names(
    table: "Table", column: Column, cells: list[list[str]], data: DataConfig, training: np.ndarray
) -> tuple[tuple[str, ...], dict[str, int], np.ndarray]:
    """Names of the classes, the number of each, and which of them training rows have."""
    used = np.unique(column.codes[training])
    trained = {label for code in used for label in cells[code]} - {""}
    there = {label for labels in cells for label in labels} - {""}
    if column.declared:
        names = class_names_of(data, set(column.declared)) if data.class_names else column.declared
        numbers = {str(number): names.index(name) for number, name in enumerate(column.declared) if name in names}
    else:
        names = class_names_of(data, there)
        numbers = {name: number for number, name in enumerate(names)}
    for code, labels in enumerate(cells):
        for label in labels:
            if label and label not in numbers:
                raise InputError(
                    f"{_place(table, column, code)}: label {label!r} in column {column.name!r} is none of the "
                    f"{len(names)} classes of {data.class_names or table.path}"
                )
    if not (data.class_names or data.other_classes or column.declared):
        only = [name for name in names if name not in trained]
        if only:
            code = next(code for code, labels in enumerate(cells) if only[0] in labels)
            raise InputError(
                f"{_place(table, column, code)}: no training image has label {only[0]!r}"
                + (f" (nor {len(only) - 1} others)" if len(only) > 1 else "")
                + "; --data.other-classes allows classes that only the evaluated split has"
            )
    return names, numbers, np.isin(np.arange(len(names)), [numbers[label] for label in trained])


def class_names_of(data: DataConfig, there: set[str]) -> tuple[str, ...]:
    """The classes in their order: that of `data.class_names`, or sorted, numbers in them as numbers."""
    if data.class_names is None:
        return tuple(sorted(there, key=natural_key))
    from tnt_jax.data.classes import read_class_names

    return read_class_names(data.class_names)
