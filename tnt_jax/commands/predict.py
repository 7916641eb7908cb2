"""Predictions, by the model's task: `python predict.py MODEL IMAGE_OR_FOLDER ... [--format table|csv|jsonl]`."""

import csv
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tnt_jax.commands.cli import command
from tnt_jax.config import DataConfig, InputError
from tnt_jax.tasks.table import TASKS
from tnt_jax.tasks.task import Answer, Task


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Says what images show, in their order, each as soon as it is known: the likeliest classes, the probabilities of
    labels and whether they are predicted, the values of a regression, or the classes of the pixels.

    Images that cannot be read are named on standard error, the others done, and the exit code is 2.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE_OR_FOLDER ...")]
    """Image files, and folders that are searched for images."""
    top_k: int = 5
    """The number of likeliest classes or labels to print."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """The form of the output: tables to read, CSV, or a line of JSON for each image."""
    batch_size: int = 32
    """Images that are computed together."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The dtype of computation; by default that in which the model was trained or published."""
    max_pixels: int = DataConfig.max_pixels
    """Images of more pixels are taken for decompression bombs, and are refused before they are decoded."""
    out: str | None = None
    """segmentation, detection: a new folder for NAME.png, the classes of the pixels, and NAME_overlay.png, the image in
    their colours; or for NAME_boxes.png, the image with its boxes."""
    zoom: float = 1.0
    """segmentation, detection: how much larger than it fits whole into the model's input an image is seen; above 1 in
    windows that overlap by a half."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.inference import predict_images
    from tnt_jax.storage.description import description_of
    from tnt_jax.storage.load import load_model

    if arguments.top_k < 1 or not arguments.images:
        raise InputError(
            f"top_k is {arguments.top_k}, and must be at least 1" if arguments.images else "no images were given"
        )
    model = load_model(arguments.model, dtype=arguments.dtype)
    description = description_of(model)
    written = _pictures(arguments.out, TASKS[description.outputs.task]) if arguments.out else None
    class_names = description.class_names
    messages = Console(stderr=True)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names need not be UTF-8

    def note(text: str) -> None:
        messages.print(text, markup=False, highlight=False, soft_wrap=True)

    if class_names is None:
        note(f"note: {arguments.model} has no class names: its classes are numbers")
    failures = 0

    def report(error: InputError) -> None:
        nonlocal failures
        failures += 1
        note(f"error: {error}")

    paths, to_read = itertools.tee(_paths(arguments.images, report, note))
    write = {"table": _write_table, "csv": _csv_writer(), "jsonl": _write_json_line}[arguments.format]
    answer = TASKS[description.outputs.task].answer
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} images"), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task("", total=None)
        options = {"batch_size": arguments.batch_size, "max_pixels": arguments.max_pixels, "zoom": arguments.zoom}
        for path, result in zip(paths, predict_images(model, to_read, **options), strict=False):
            progress.advance(task)
            if isinstance(result, InputError):
                report(result)
            else:
                write(path, answer(result, class_names, arguments.top_k))
                if written and (error := written(path, result)):
                    report(error)
    if failures:
        raise InputError(f"{failures:,} of what was given could not be read")


def _paths(given: tuple[str, ...], report, note) -> Iterator[str]:
    """The images that were given and those in the folders, as they are asked for."""
    from tnt_jax.data.listing import Walk, images_below

    for path in map(os.path.expanduser, given):
        if not os.path.isdir(path):
            yield path
            continue
        walk = Walk()
        try:
            yield from images_below(path, walk)
            if others := walk.what_was_left_out():
                note(f"note: {path} holds what is no image, left out: {others}")
        except InputError as error:
            report(error)


def _pictures(out: str, task: Task) -> Callable[[str, dict], InputError | None]:
    """The function that writes the pictures of a result, and returns the error where it cannot."""
    from tnt_jax.data.decode import read_image
    from tnt_jax.data.samples import visible
    from tnt_jax.storage.files import write_whole

    if not task.dense:
        raise InputError(f"--out is for masks and boxes, and the task of the model is {task.name}")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out is {out}, which is there already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)

    def write(path: str, result: dict) -> InputError | None:
        for ending, picture in task.pictures(result, visible(read_image(path))).items():
            file = folder / f"{Path(path).stem}{ending}"
            if file.exists():
                return InputError(f"{path} is not written: {file} is of another image with this name")
            write_whole(file, lambda unfinished, picture=picture: picture.save(unfinished, "PNG"))
        return None

    return write


def _write_json_line(path: str, answer: Answer) -> None:
    from tnt_jax.commands.tables import json_line

    print(json_line({"image": path, **answer.fields}), flush=True)


def _csv_writer():
    """A line for an image: label, class and score of each rank, and before them the labels that are predicted, joined
    by |; or the value of each target.
    """
    writer = None

    def write(path: str, answer: Answer) -> None:
        nonlocal writer
        if writer is None:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(["image", *answer.cells])
        writer.writerow([path, *answer.cells.values()])
        sys.stdout.flush()

    return write


SHOWN = {
    "score": ("probability", "right", lambda value: f"{value:.2%}"),
    "label": ("label", "right", str),
    "class": ("class", "left", escape),
    "predicted": ("prediction", "left", lambda value: "yes" if value else "no"),
    "target": ("target", "left", escape),
    "value": ("value", "right", lambda value: f"{value:.6g}"),
    "box": ("left, top, width, height", "left", escape),
    "share": ("share of the pixels", "right", lambda value: f"{value:.2%}"),
}
"""Columns of a table: title, alignment, and how a value is printed."""


def _write_table(path: str, answer: Answer) -> None:
    console = Console()
    console.print(path, markup=False, highlight=False, soft_wrap=True)
    table, columns = Table(), [name for name in SHOWN if name in answer.rows[0]]
    for name in columns:
        title, justify, _ = SHOWN[name]
        table.add_column(title, justify=justify)
    for row in answer.rows:
        table.add_row(*(SHOWN[name][2](row[name]) for name in columns))
    console.print(table)
