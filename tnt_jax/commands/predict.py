"""Names what images show: `python predict.py MODEL IMAGE_OR_FOLDER ... [--format table|csv|jsonl]`."""

import csv
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tnt_jax.commands.cli import command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Names what images show, in their order, each as soon as it is known.

    Images that cannot be read are named on standard error, the others done, and the exit code is 2.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE_OR_FOLDER ...")]
    """Image files, and folders that are searched for images."""
    top_k: int = 5
    """How many of the most likely classes to print."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """What is printed: tables to read, CSV, or a line of JSON for each image."""
    batch_size: int = 32
    """Images that are computed together."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.inference import most_likely, predict_images
    from tnt_jax.storage.description import description_of
    from tnt_jax.storage.load import load_model

    if arguments.top_k < 1 or not arguments.images:
        raise InputError("top_k must be at least 1" if arguments.images else "no images were given")
    model = load_model(arguments.model)
    class_names = description_of(model).class_names
    messages = Console(stderr=True)
    if class_names is None:
        note = f"note: {arguments.model} has no class names: its classes are numbers"
        messages.print(note, markup=False, highlight=False, soft_wrap=True)
    failures = 0

    def report(error: InputError) -> None:
        nonlocal failures
        failures += 1
        messages.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)

    paths, to_read = itertools.tee(_paths(arguments.images, report))
    write = {"table": _write_table, "csv": _csv_writer(), "jsonl": _write_json_line}[arguments.format]
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} images"), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task("", total=None)
        for path, result in zip(paths, predict_images(model, to_read, batch_size=arguments.batch_size), strict=False):
            progress.advance(task)
            if isinstance(result, InputError):
                report(result)
            else:
                write(path, result, most_likely(result, class_names, arguments.top_k))
    if failures:
        raise InputError(f"{failures:,} of what was given could not be read")


def _paths(given: tuple[str, ...], report) -> Iterator[str]:
    """The images that were given and those in the folders, as they are asked for."""
    from tnt_jax.data.listing import images_below

    for path in given:
        if not os.path.isdir(path):
            yield path
            continue
        try:
            yield from images_below(path)
        except InputError as error:
            report(error)


def _write_json_line(path: str, result: dict, top: list[dict]) -> None:
    summary = {name: result[name] for name in ("pred_label", "pred_class", "pred_score")}
    print(json.dumps({"image": path, **summary, "top": top}, ensure_ascii=False), flush=True)


def _csv_writer():
    writer = None

    def write(path: str, result: dict, top: list[dict]) -> None:
        nonlocal writer
        if writer is None:
            ranks = range(1, len(top) + 1)
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(["image", *(f"{name}_{rank}" for rank in ranks for name in ("label", "class", "score"))])
        writer.writerow([path, *(value for row in top for value in row.values())])
        sys.stdout.flush()

    return write


def _write_table(path: str, result: dict, top: list[dict]) -> None:
    console = Console()
    console.print(path, markup=False, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("probability", justify="right")
    table.add_column("label", justify="right")
    table.add_column("class")
    for row in top:
        table.add_row(f"{row['score']:.2%}", str(row["label"]), escape(row["class"]))
    console.print(table)
