"""Rows of values in a terminal, and as a file: CSV, JSON lines or Markdown, by its ending."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tnt_jax.storage.files import write_whole

Row = dict[str, Any]

NAMES = ("model", "weights", "data", "split", "method", "size", "class", "target")
"""Columns that say whose row it is; the others are values."""
MAX_NAME_WIDTH = 24
"""Longer names are broken into lines."""


def write_rows(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Writes rows with one header, which has every column that any of them has. The file appears when it is complete.

    Raises:
        InputError: it cannot be written.
    """
    text = {".csv": as_csv, ".jsonl": as_json_lines, ".md": as_markdown}[Path(path).suffix](rows)
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8", errors="surrogateescape"))


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of all rows, in the order in which they come up."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_csv(rows: Sequence[Row]) -> str:
    """None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json_lines(rows: Sequence[Row]) -> str:
    """A JSON object on a line for each row."""
    return "".join(json_line(row) + "\n" for row in rows)


def json_line(row: Row) -> str:
    """A row as a JSON object. File names that are not UTF-8 are escaped, as `os.fsdecode` gives them."""
    line = json.dumps(row, ensure_ascii=False)
    return line if _is_utf8(line) else json.dumps(row)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_markdown(rows: Sequence[Row]) -> str:
    """A table as GitHub shows it."""
    columns = columns_of(rows)
    lines = [columns, ["---"] * len(columns), *([row.get(name) for name in columns] for row in rows)]
    cells = ([("" if cell is None else str(cell)).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def print_rows(
    console: Console, rows: Sequence[dict[str, str]], *, title: str | None = None, caption: str = ""
) -> None:
    """Prints a line for each row; where these are too wide, a column for each, as many side by side as fit.

    Neither names nor digits are cut off. An interval in brackets stands below its value.
    """
    table = _by_row(rows, title, caption)
    if _fits(console, table):
        console.print(table)
        return
    most = next((n for n in range(len(rows), 1, -1) if _fits(console, _by_column(rows[:n], title, caption))), 1)
    tables = math.ceil(len(rows) / most)
    for group in np.array_split(np.arange(len(rows)), tables):
        console.print(_by_column([rows[index] for index in group], title, caption))


def _fits(console: Console, table: Table) -> bool:
    return console.measure(table, options=console.options.update(width=10**6)).maximum <= console.width


def _by_row(rows: Sequence[dict[str, str]], title: str | None, caption: str) -> Table:
    table = _empty_table(title, caption)
    for name in columns_of(rows):
        _add_column(table, name, is_name=name in NAMES)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns_of(rows)))
    return table


def _by_column(rows: Sequence[dict[str, str]], title: str | None, caption: str) -> Table:
    table = _empty_table(title, caption)
    _add_column(table, "", is_name=True)
    for _ in rows:
        _add_column(table, "", is_name=False)
    table.show_header = False
    names = columns_of(rows)
    last_name = [name for name in names if name in NAMES][-1:]
    for name in names:
        table.add_row(name, *(_cell(row.get(name)) for row in rows), end_section=[name] == last_name)
    return table


def _empty_table(title: str | None, caption: str) -> Table:
    # As text: a name such as `runs/[red]` is no markup.
    return Table(title=Text(title) if title else None, caption=Text(caption), box=rich.box.SIMPLE_HEAD, pad_edge=False)


def _add_column(table: Table, header: str, *, is_name: bool) -> None:
    justify = "left" if is_name else "right"
    table.add_column(Text(header), justify=justify, overflow="fold", max_width=MAX_NAME_WIDTH)


def _cell(value: str | None) -> Text:
    return Text("-" if value is None else value.replace(" (", "\n("))
