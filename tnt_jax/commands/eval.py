"""Evaluation of models: `python eval.py MODEL ... [--source SOURCE ...] [--probe knn linear]`, as table and files."""

import dataclasses
import itertools
import math
import sys
from typing import Annotated, Literal

import tyro
from rich.console import Console

from tnt_jax.commands.cli import Flag, command
from tnt_jax.config import InputError
from tnt_jax.tasks.table import TASKS, metric_of


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluates models on test images, by their task: each image counts once, metrics have 95% confidence intervals."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]
    """Folders of runs (averaged and raw weights are evaluated) or of models, published names, OWNER/NAME on the hub,
    addresses, or checkpoint files."""
    source: tuple[str, ...] = ()
    """The source of images, such as `digits`, `idx:FOLDER`, `imagenet:FOLDER`, `imagenet-a:FOLDER`, one or several;
    a training run knows its own."""
    split: str | None = None
    """The split, such as train or validation. By default test; where there is none, what training evaluated."""
    real_labels: str | None = None
    """ReaL's labels (real.json): `imagenet:FOLDER` is scored with them too."""
    probe: tuple[Literal["knn", "linear"], ...] = ()
    """Instead of the model's own classes: nearest neighbours, or a linear classifier, on its frozen features."""
    explain: tuple[str, ...] = ()
    """The methods whose faithfulness is measured, by deletion and insertion: rollout, grad-cam, integrated-gradients,
    one or several."""
    size: Literal["sentences", "words", "pixels"] | None = None
    """For --explain: of a place of the map; by default words."""
    images: int | None = None
    """For --explain: only so many images, evenly spread."""
    per_class: Flag = False
    """Print a table of the classes as well, or of the labels or targets."""
    out: str | None = None
    """Write the prediction for each image to this file: .csv or .jsonl."""
    table: tuple[str, ...] = ()
    """Write the table to these files: .csv (every digit) or .md (as printed)."""
    batch_size: int = 64
    """Images that are computed together, over all devices; rounded up to a multiple of them."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The dtype of computation; by default that in which the model was trained or published."""
    image_size: tuple[int, int] | None = None
    """Height and width that images are shown at; by default the model's. Positions are resized."""
    crop: float | None = None
    """Share of the shorter side that is kept, above 0 and at most 1; by default the model's."""
    tta: Literal["flip"] | None = None
    """flip: the mean of the outputs for each image and its mirror image."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.commands.tables import print_rows, write_rows
    from tnt_jax.evaluation.evaluate import View, evaluate_model, probe_model
    from tnt_jax.evaluation.faithfulness import explain_model
    from tnt_jax.storage.files import check_ending

    if not arguments.models:
        raise InputError("no model was given")
    for path in arguments.table:
        check_ending(path, (".csv", ".md"), "a table")
    if arguments.out:
        check_ending(arguments.out, (".csv", ".jsonl"), "a file of predictions")
    rows, predictions, console = [], [], Console(width=None if sys.stdout.isatty() else 120)
    options = {"batch_size": arguments.batch_size}
    chosen = _chosen(arguments)
    # All models are opened before anything is computed.
    if chosen == "probe":
        options |= {"methods": arguments.probe}
        tables = [probe_model(model, arguments.source, **options) for model in arguments.models]
    elif chosen == "explain":
        options |= {"methods": arguments.explain, "size": arguments.size or "words", "count": arguments.images}
        tables = [explain_model(model, arguments.source, **options) for model in arguments.models]
    else:
        options |= {"split": arguments.split, "real_labels_file": arguments.real_labels, "dtype": arguments.dtype}
        options |= {"view": View(arguments.image_size, arguments.crop, arguments.tta)}
        tables = [evaluate_model(model, arguments.source, **options) for model in arguments.models]
    for found in itertools.chain.from_iterable(tables):
        row = found
        if not chosen:
            row = _row_of(found)
            if arguments.per_class:
                title = f"{found.model}, {found.weights} weights, {found.data}, {found.split}"
                classes = found.predictions.per_output(found.images.class_names)
                print_rows(console, [_printed(each) for each in classes], title=title, caption=CAPTION)
            if arguments.out:
                predictions += _predictions(found)
        rows.append(row)
        _print_progress(row)
    print_rows(console, [_printed(row) for row in rows], caption=CAPTION)
    for path in arguments.table:
        write_rows(path, rows if path.endswith(".csv") else [_printed(row) for row in rows])
    if arguments.out:
        write_rows(arguments.out, predictions)


def _chosen(arguments: Arguments) -> str | None:
    """The table that is asked for instead of the plain evaluation. Refuses flags that the table has no use for."""
    chosen = [name for name in ("probe", "explain") if getattr(arguments, name)]
    if len(chosen) > 1:
        raise InputError(f"--{chosen[0]} and --{chosen[1]} are two tables; ask for one at a time")
    table = chosen[0] if chosen else None
    plain = ("split", "real_labels", "per_class", "out", "dtype", "image_size", "crop", "tta")
    for name in plain if table else ():
        if getattr(arguments, name):
            raise InputError(f"--{name.replace('_', '-')} is of the plain evaluation, and has no use with --{table}")
    for name in ("size", "images") if table != "explain" else ():
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} is of --explain, which was not given")
    return table


def _row_of(done) -> dict:
    row = {"model": done.model, "weights": done.weights, "data": done.data, "split": done.split}
    row |= done.predictions.metrics()
    return row | {f"published_{name}": value for name, value in done.published.items()}


def _print_progress(row: dict) -> None:
    """One line for a row of the table; the next may take hours."""
    what = row.get("weights") or row["method"]
    name = next(name for name in ("insertion", *(task.metrics[0].name for task in TASKS.values())) if name in row)
    value = f"{metric_of(name).title} {metric_of(name).text(row[name])}"
    print(f"{row['model']}, {what}, {row['data']}, {row['split']}: {value}", file=sys.stderr, flush=True)


CAPTION = "proportions in percent; in brackets 95% intervals"
NOT_PRINTED = ("macro_precision", "macro_recall")
"""Columns of the .csv table alone: a line for people has no room for them."""


def _printed(row: dict) -> dict[str, str]:
    """A row as people read it: a share in percent, and its interval behind it."""

    def text_of(name: str, value: float) -> str:
        if name in ("images", "training_images", "images_per_second"):
            return f"{value:,.0f}"
        return f"{100 * value:.2f}" if metric_of(name.removeprefix("published_")).proportion else f"{value:.4f}"

    shown = {}
    for name, value in row.items():
        if name.endswith(("_low", "_high")) or name in NOT_PRINTED:
            continue
        if value is None or (isinstance(value, float) and math.isnan(value)):
            text = "-"
        else:
            text = value if isinstance(value, str) else text_of(name, value)
        if f"{name}_low" in row and text != "-":
            text += f" ({text_of(name, row[f'{name}_low'])} to {text_of(name, row[f'{name}_high'])})"
        is_published = name.startswith("published_")
        title = metric_of(name.removeprefix("published_")).title
        shown[f"published {title}" if is_published else title] = text
    return shown


def _predictions(done) -> list[dict]:
    """A row for each image: the truth and the prediction."""
    files, rows = getattr(done.images, "files", None), done.predictions.rows(done.images.class_names)
    of_run = {"model": done.model, "weights": done.weights, "data": done.data, "split": done.split}
    return [{**of_run, "image": files[index] if files else index, **row} for index, row in enumerate(rows)]
