"""How good models are: `python eval.py MODEL ... [--source SOURCE ...] [--probe knn linear]`, as table and files."""

import dataclasses
import itertools
import math
import sys
from typing import Annotated, Literal

import rich.box
import tyro
from rich.console import Console
from rich.table import Table

from tnt_jax.commands.cli import Flag, command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prints how many of the test images models get right, each image counted once, with 95% confidence intervals."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]
    """Folders of runs (averaged and raw weights are evaluated) or of models, published names, OWNER/NAME on the hub,
    addresses, or checkpoint files."""
    source: tuple[str, ...] = ()
    """Where images come from, such as `digits`, `idx:FOLDER`, `imagenet:FOLDER`, `imagenet-a:FOLDER`, one or several;
    a training run knows its own."""
    real_labels: str | None = None
    """ReaL's labels (real.json): `imagenet:FOLDER` is scored with them too."""
    probe: tuple[Literal["knn", "linear"], ...] = ()
    """Instead of the model's own classes: nearest neighbours, or a linear classifier, on its frozen features."""
    per_class: Flag = False
    """Print a table of the classes as well."""
    out: str | None = None
    """Write the answer for each image to this file: .csv or .jsonl."""
    table: tuple[str, ...] = ()
    """Write the table to these files: .csv (every digit) or .md (as printed)."""
    batch_size: int = 64
    """Images that are computed together, over all devices."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.commands.tables import write_rows
    from tnt_jax.evaluation.evaluate import evaluate_model, probe_model
    from tnt_jax.evaluation.scores import metrics_of, per_class
    from tnt_jax.storage.files import check_ending

    if not arguments.models:
        raise InputError("no model was given")
    for path in arguments.table:
        check_ending(path, (".csv", ".md"), "a table")
    if arguments.out:
        check_ending(arguments.out, (".csv", ".jsonl"), "a file of answers")
    rows, answers, console = [], [], Console(width=None if sys.stdout.isatty() else 120)
    if arguments.probe:
        _refuse(arguments, ("real_labels", "per_class", "out"))
        probes = [
            probe_model(model, arguments.source, arguments.probe, batch_size=arguments.batch_size)
            for model in arguments.models
        ]
        for row in itertools.chain.from_iterable(probes):
            rows.append(row)
            _tell(row)
    else:
        options = {"real_labels_file": arguments.real_labels, "batch_size": arguments.batch_size}
        # All are opened before anything is computed.
        evaluations = [evaluate_model(model, arguments.source, **options) for model in arguments.models]
        for done in itertools.chain.from_iterable(evaluations):
            rows.append({"model": done.model, "weights": done.weights, "data": done.data, **metrics_of(done.answers)})
            rows[-1] |= {f"published_{name}": value for name, value in done.published.items()}
            _tell(rows[-1])
            if arguments.per_class:
                title = f"{done.model}, {done.weights} weights, {done.data}"
                _print(console, [_printed(row) for row in per_class(done.answers, done.images.class_names)], title)
            if arguments.out:
                answers += _answers(done)
    _print(console, [_printed(row) for row in rows], None)
    for path in arguments.table:
        write_rows(path, rows if path.endswith(".csv") else [_printed(row) for row in rows])
    if arguments.out:
        write_rows(arguments.out, answers)


def _tell(row: dict) -> None:
    """Says that a row of the table is known; the next may take hours."""
    what = row.get("weights") or row["method"]
    print(f"{row['model']}, {what}, {row['data']}: top-1 {row['top1']:.2%}", file=sys.stderr, flush=True)


def _refuse(arguments: Arguments, options: tuple[str, ...]) -> None:
    for option in options:
        if getattr(arguments, option):
            raise InputError(f"--{option.replace('_', '-')} is about the model's own classes, and --probe is not")


def _printed(row: dict) -> dict[str, str]:
    """A row as people read it: a share in percent with its interval behind it."""
    printed = {}
    for name, value in row.items():
        if name.endswith(("_low", "_high")):
            continue
        title = {"top1": "top-1", "top5": "top-5", "ece": "ECE", "images_per_second": "images/s"}.get(name)
        title = title or name.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")
        if value is None or (isinstance(value, float) and math.isnan(value)):
            text = "-"
        elif isinstance(value, str):
            text = value
        elif name in ("images", "training_images", "images_per_second"):
            text = f"{value:,.0f}"
        elif name == "loss":
            text = f"{value:.4f}"
        else:
            text = f"{100 * value:.2f}"
        if f"{name}_low" in row:
            text += f" ({100 * row[f'{name}_low']:.2f} to {100 * row[f'{name}_high']:.2f})"
        printed[title] = text
    return printed


def _answers(done) -> list[dict]:
    from tnt_jax.inference import class_name

    names, files = done.images.class_names, getattr(done.images, "files", None)
    return [
        {
            "model": done.model,
            "weights": done.weights,
            "data": done.data,
            "image": files[index] if files else index,
            "label": int(label),
            "class": class_name(label, names),
            "pred_label": int(top[0]),
            "pred_class": class_name(top[0], names),
            "pred_score": float(scores[0]),
            "top": " ".join(map(str, top)),
        }
        for index, (label, top, scores) in enumerate(
            zip(done.answers.labels, done.answers.top, done.answers.scores, strict=True)
        )
    ]


def _print(console: Console, rows: list[dict[str, str]], title: str | None) -> None:
    from tnt_jax.commands.tables import columns_of

    caption = "shares in percent, below them their 95% intervals"
    table = Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in columns_of(rows):
        words, long = name in ("model", "weights", "data", "method", "class"), name in ("model", "data")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not long)
    for row in rows:
        table.add_row(*(row.get(name, "-").replace(" (", "\n(") for name in columns_of(rows)))
    console.print(table, markup=False)
