"""Tables of images: CSV, TSV and Parquet, a row for an image."""

import csv
import dataclasses
import functools
import io
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.classes import read_class_names
from tnt_jax.data.columns import Column, as_one_array, column_of, is_label, parts, targets_of, weights_of
from tnt_jax.data.decode import Reading
from tnt_jax.data.sources import ImageFiles, Images, NoSplitError, Split, names_of_split
from tnt_jax.tasks.table import TASKS
from tnt_jax.tasks.weights import images_per_class

IMAGE_COLUMNS = ("image", "path", "file", "filename", "file_name", "image_path", "filepath")
SHOWN = 5  # paths in a message
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it was read: rows of text."""

    path: str
    columns: Mapping[str, Column]
    count: int
    lines: bool = False
    """True if rows have line numbers."""

    def __len__(self) -> int:
        return self.count

    def chosen(self, given: str | None, usual: Sequence[str], option: str, required: bool = False) -> str | None:
        """The name of a column: the one that was given, or else the first of the usual ones that is there."""
        by_lower = {name.lower(): name for name in self.columns}
        if given is not None:
            if given in self.columns:
                return given
            raise InputError(f"{self.path} has no column {given!r}; it has {self._listed()}")
        found = next((by_lower[name] for name in usual if name in by_lower), None)
        if found is None and required:
            raise InputError(
                f"{self.path} has no column {' or '.join(map(repr, usual[:3]))}; it has {self._listed()}: name one of "
                f"them with {option}"
            )
        return found

    def _listed(self) -> str:
        return ", ".join(map(repr, list(self.columns)[:20]))

    def place(self, row: int) -> str:
        """The place of a row, for a message."""
        if not self.lines:
            return f"{self.path}, row {row + 1}"
        return f"{self.path}, line {_line_of(self.path, row)}"


def open_table(argument: str, data: DataConfig, split: str) -> Split:
    """A table with a row for each image: its path, relative to the table, and its label or labels.

    A column `split` says which rows are of a split; without one all are training images.

    Raises:
        InputError: the table cannot be read, a column is missing, or a row is wrong: the message names it.
    """
    path = os.path.expanduser(argument)
    table = read_table(path, data.encoding)
    image = table.chosen(data.image_column, IMAGE_COLUMNS, "--data.image-column", required=True)
    split_column = table.chosen(data.split_column, ("split",), "--data.split-column")
    names = table.columns[image]
    folder = os.path.dirname(os.path.abspath(path))
    training = rows_of(table, split_column, data.train_split)
    rows = rows_of(table, split_column, split)
    if rows is None:
        there = table.columns[split_column].texts if split_column else (data.train_split,)
        raise NoSplitError(split, sorted(there))
    _check_images(table, names, folder)
    name = table.columns[split_column].text_of(int(rows[0])) if split_column else data.train_split
    images = ImageFiles(folder, names.files_of(rows))
    if TASKS[data.task].told == "masks":
        return _with_masks(table, data, images, rows, training, name)
    return split_of_rows(table, data, images, rows, training, name, {image, split_column})


def _with_masks(
    table: Table, data: DataConfig, images: ImageFiles, rows: np.ndarray, training: np.ndarray | None, name: str
) -> Split:
    """Some rows of a table whose labels are the paths of masks, relative to the table."""
    from tnt_jax.data.masks import CLASSES, class_numbers, split_of_files

    if len(data.label_columns) > 1:
        raise InputError(f"{table.path}: one column has masks, and {' and '.join(data.label_columns)} were named")
    given = data.label_columns[0] if data.label_columns else None
    column = table.columns[table.chosen(given, TASKS[data.task].label_columns, "--data.label-columns", required=True)]
    if (row := column.empty_row()) is not None:
        raise InputError(f"{table.place(row)}: the cell of {column.name!r} is empty")
    _check_there(table, column, images.folder, "masks")
    beside = os.path.join(images.folder, CLASSES)
    classes = data.class_names or (beside if os.path.isfile(beside) else None)
    trained = ImageFiles(images.folder, column.files_of(rows if training is None else training))
    names = read_class_names(classes) if classes else class_numbers(trained, data)
    files = images, ImageFiles(images.folder, column.files_of(rows))
    told = values_of(table, told_of_rows(table, data), rows)
    return dataclasses.replace(split_of_files(files, names, data, name), **told)


def split_of_rows(
    table: Table,
    data: DataConfig,
    images: Images,
    rows: np.ndarray,
    training: np.ndarray | None,
    name: str,
    others: set[str | None],
) -> Split:
    """Some rows of a table as a split: their labels, and what else is told of them.

    Args:
        images: of these rows.
        training: the rows that are trained on, by whose labels the classes are known.
        others: columns that are no labels.

    Raises:
        InputError: a column is missing, or a cell is wrong: the message names it.
    """
    columns = told_of_rows(table, data)
    labels = targets_of(table, data, others | {column.name for column in columns.values()}, training)
    targets, class_names, in_training = labels
    targets = targets if len(rows) == len(table) else targets[rows]
    if in_training is not None:
        check_classes(class_names, in_training, images_per_class(targets, len(class_names)) > 0, table.path, data, name)
    return Split(images, targets, class_names, name, Reading.of(data), **values_of(table, columns, rows))


def told_of_rows(table: Table, data: DataConfig) -> dict[str, Column]:
    """The columns of groups, folds and weights, by the field of `Split`, where there are any."""
    found = {
        "folds": table.chosen(data.fold_column, ("fold",), "--data.fold-column"),
        "groups": table.chosen(data.group_column, ("group",), "--data.group-column"),
        "weights": table.chosen(data.weight_column, ("weight",), "--data.weight-column"),
    }
    return {field: table.columns[name] for field, name in found.items() if name}


def values_of(table: Table, columns: dict[str, Column], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Groups, folds and weights of some rows."""
    made = {
        "folds": lambda column: column.numbers(in_order=True),
        "groups": lambda column: column.numbers(),
        "weights": lambda column: weights_of(table, column),
    }
    return {field: made[field](column)[rows] for field, column in columns.items()}


def rows_of(table: Table, split_column: str | None, split: str) -> np.ndarray | None:
    """The rows of a split; None where there is no such split."""
    if split_column is None:
        return np.arange(len(table)) if split in names_of_split("train") else None
    column = table.columns[split_column]
    if (row := column.empty_row()) is not None:
        raise InputError(f"{table.place(row)}: the cell of {split_column!r} is empty")
    for name in names_of_split(split):
        codes = [code for code, text in enumerate(column.texts) if text.lower() == name.lower()]
        if codes:
            return np.flatnonzero(np.isin(column.codes, codes))
    return None


def check_classes(
    class_names: Sequence[str], in_training: np.ndarray, here: np.ndarray, name: str, data: DataConfig, split: str
) -> None:
    """Says which classes a split lacks, and refuses those that training lacks unless `data.other_classes` allows them.

    Args:
        in_training: bool (classes,), whether the training images have each.
        here: the same of the split.
    """
    if (only := [class_names[label] for label in np.flatnonzero(here & ~in_training)]) and not data.other_classes:
        raise InputError(
            f"{name}: split {split!r} has classes that no training image has: {listed(only)}; "
            "--data.other-classes allows them"
        )
    if lacking := [class_names[label] for label in np.flatnonzero(in_training & ~here)]:
        logger.warning("%s: split %r has no image of %s", name, split, listed(lacking))


def listed(names: Sequence[str], count: int | None = None) -> str:
    """The first few of some names, and how many others there are."""
    count = len(names) if count is None else count
    shown = ", ".join(map(str, names[:SHOWN]))
    return shown if count <= SHOWN else f"{shown} and {count - SHOWN:,} others"


def _check_images(table: Table, column: Column, folder: str) -> None:
    """Every row has an image, which no other row has, and which is there."""
    if (row := column.empty_row()) is not None:
        raise InputError(f"{table.place(row)}: the cell of {column.name!r} is empty")
    # By 64 bits of each path instead of the path: a tenth of the memory.
    one_spelling = np.fromiter((hash(_plain(name, folder)) for name in parts(column.cells)), np.int64, len(table))
    different, first = np.unique(one_spelling, return_index=True)
    if len(different) < len(table):
        again = np.setdiff1d(np.arange(len(table)), first)
        name, before = _name(column, int(again[0])), int(np.argmax(one_spelling == one_spelling[again[0]]))
        others = f"; so are {len(again) - 1} other rows" if len(again) > 1 else ""
        raise InputError(
            f"{table.place(int(again[0]))}: {name} is there for the second time, first in {table.place(before)}{others}"
        )
    _check_there(table, column, folder, "images")


def _check_there(table: Table, column: Column, folder: str, what: str) -> None:
    """Every row has a file that is there."""
    keys = np.fromiter(map(hash, parts(column.cells)), np.int64, len(table))
    missing = np.flatnonzero(~np.isin(keys, _keys_of_files(os.fsencode(folder), column)))
    if len(missing):
        names = listed([_name(column, row) for row in missing[:SHOWN].tolist()], len(missing))
        raise InputError(
            f"{table.place(int(missing[0]))}: {len(missing):,} of {len(table):,} {what} are not there, looked for in "
            f"{folder}: {names}"
        )


def _plain(name: bytes, folder: str) -> bytes:
    """A path as it is written without detours: `a/../b`, `./b`, or its whole address."""
    if b"./" in name or b"//" in name or name.startswith(b"/"):
        name = os.path.normpath(name)
        inside = os.path.join(os.fsencode(folder), b"")
        return name.removeprefix(inside)
    return name


def _name(column: Column, row: int) -> str:
    return os.fsdecode(column.cells[row].as_py())


def _keys_of_files(folder: bytes, column: Column) -> np.ndarray:
    """The keys by which the paths of all files would be hashed, in the folders that a column names.

    Each folder is listed once, which is faster than to ask for every file.
    """
    found = []
    for place in {name[: name.rfind(b"/") + 1] for name in parts(column.cells)}:
        try:
            there = os.listdir(os.path.join(folder, place))
        except OSError:
            continue
        found.append(np.fromiter((hash(place + name) for name in there), np.int64, len(there)))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def read_table(path: str, encoding: str | None = None) -> Table:
    """Reads a CSV, TSV or Parquet file.

    Raises:
        InputError: it cannot be read as one.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read as a table: {error.strerror}") from error
    return _read(path, encoding, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)  # both splits of a run are opened from one reading
def _read(path: str, encoding: str | None, *version: int) -> Table:
    del version
    parquet = pathlib.Path(path).suffix.lower() in (".parquet", ".pq")
    try:
        columns = _read_parquet(path) if parquet else _read_text(path, encoding)
    except InputError:
        raise
    except (OSError, ValueError, LookupError, csv.Error) as error:
        reason = _uneven(path, encoding) if "Expected" in str(error) else str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a table: {reason}") from error
    table = Table(path, columns, len(next(iter(columns.values())).cells) if columns else 0, lines=not parquet)
    if not len(table):
        raise InputError(f"{path} has no rows")
    return table


def _read_text(path: str, encoding: str | None) -> dict[str, Column]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if not head.strip():
        raise InputError(f"{path} is empty; its first line should name the columns")
    encoding = encoding or ("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    header, delimiter = _header(path, head.decode(encoding, "replace").removeprefix("\ufeff"))
    again = [name for name in header if header.count(name) > 1]
    if again:
        raise InputError(f"{path} has two columns {again[0]!r}")
    read = arrow_csv.read_csv(
        path,
        arrow_csv.ReadOptions(encoding=encoding, column_names=header, skip_rows=1),
        arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        arrow_csv.ConvertOptions(
            check_utf8=False, column_types=dict.fromkeys(header, pa.binary()), strings_can_be_null=False
        ),
    )
    return {name: Column(name, as_one_array(read[name])) for name in header}


def _uneven(path: str, encoding: str | None) -> str:
    """The row that has another number of cells than the header."""
    with open(path, encoding=encoding or "latin-1", newline="") as file:
        head = file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter=max(",;\t", key=head.count))
        count = len(next(rows))
        for row in rows:
            if row and len(row) != count:
                return f"line {rows.line_num} has {len(row)} cells, and the first line {count}: {row!r:.80}"
    return "its rows have different numbers of cells"


def _header(path: str, head: str) -> tuple[list[str], str]:
    """Names of the columns, and what stands between them."""
    first = head.splitlines()[0]
    delimiter = "\t" if path.lower().endswith((".tsv", ".tab")) else ","
    if first.count(delimiter) == 0:
        other = max(";\t,", key=first.count)
        if first.count(other):
            logger.warning("%s: its columns are divided by %r", path, other)
            delimiter = other
    names = [name.strip() for name in next(csv.reader(io.StringIO(head), delimiter=delimiter))]
    return names, delimiter


def _read_parquet(path: str) -> dict[str, Column]:
    from pyarrow import parquet

    read = parquet.read_table(path)
    return {name: column_of(name, read[name]) for name in read.column_names if is_label(read[name].type)}


def _line_of(path: str, row: int) -> int:
    """The line where a row begins, from 1 on: cells may hold line breaks."""
    with open(path, encoding="latin-1", newline="") as file:
        head = file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter=max(",;\t", key=head.count))
        before = 0
        for _ in range(row + 1):
            next(rows, None)
            before = rows.line_num
    return before + 1
