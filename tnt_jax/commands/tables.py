"""Rows of values as a file: CSV, JSON lines or Markdown, by its ending."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tnt_jax.storage.files import write_whole

Row = dict[str, Any]


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
