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
    """Prints what models are worth on test images, by their task: each image counted once, with 95% confidence
    intervals."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]
    """Folders of runs (averaged and raw weights are evaluated) or of models, published names, OWNER/NAME on the hub,
    addresses, or checkpoint files."""
    source: tuple[str, ...] = ()
    """Where images come from, such as `digits`, `idx:FOLDER`, `imagenet:FOLDER`, `imagenet-a:FOLDER`, one or several;
    a training run knows its own."""
    split: str | None = None
    """What is evaluated instead of the test images, such as train or validation."""
    real_labels: str | None = None
    """ReaL's labels (real.json): `imagenet:FOLDER` is scored with them too."""
    probe: tuple[Literal["knn", "linear"], ...] = ()
    """Instead of the model's own classes: nearest neighbours, or a linear classifier, on its frozen features."""
    attack: Literal["fgsm", "pgd"] | None = None
    """Accuracy under attack: on images that differ from test images by at most --epsilon, made to fool the model."""
    epsilon: str = "8/255"
    """For --attack: the largest change of a pixel, of a range of 1."""
    steps: int = 20
    """For --attack pgd: steps along the gradient."""
    attack_out: str | None = None
    """For --attack: also write the images to this new folder, as `folder:` reads them."""
    explain: tuple[str, ...] = ()
    """How faithful explanations are, by deletion and insertion: rollout, legrad, grad-cam, integrated-gradients,
    smoothgrad, one or several."""
    size: Literal["sentences", "words", "pixels"] = "words"
    """For --explain: of a place of the map."""
    images: int | None = None
    """For --attack and --explain: only so many test images, evenly spread."""
    per_class: Flag = False
    """Print a table of the classes as well, or of the labels or targets."""
    out: str | None = None
    """Write the prediction for each image to this file: .csv or .jsonl."""
    table: tuple[str, ...] = ()
    """Write the table to these files: .csv (every digit) or .md (as printed)."""
    batch_size: int = 64
    """Images that are computed together, over all devices."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What is computed in; by default what the model was trained or published in."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.commands.tables import write_rows
    from tnt_jax.evaluation.evaluate import evaluate_model
    from tnt_jax.evaluation.predictions import metrics_of, per_output
    from tnt_jax.storage.files import check_ending

    if not arguments.models:
        raise InputError("no model was given")
    for path in arguments.table:
        check_ending(path, (".csv", ".md"), "a table")
    if arguments.out:
        check_ending(arguments.out, (".csv", ".jsonl"), "a file of predictions")
    rows, predictions, console = [], [], Console(width=None if sys.stdout.isatty() else 120)
    chosen = [name for name in ("probe", "attack", "explain") if getattr(arguments, name)]
    if len(chosen) > 1:
        raise InputError(f"--{chosen[0]} and --{chosen[1]} are two tables; ask for one at a time")
    if chosen:
        _refuse(arguments, chosen[0], ("split", "real_labels", "per_class", "out", "dtype"))
        for row in itertools.chain.from_iterable(_tables(arguments, chosen[0])):
            rows.append(row)
            _tell(row)
    else:
        options = {
            "split": arguments.split,
            "real_labels_file": arguments.real_labels,
            "batch_size": arguments.batch_size,
            "dtype": arguments.dtype,
        }
        # All are opened before anything is computed.
        evaluations = [evaluate_model(model, arguments.source, **options) for model in arguments.models]
        for done in itertools.chain.from_iterable(evaluations):
            rows.append(
                {"model": done.model, "weights": done.weights, "data": done.data, **metrics_of(done.predictions)}
            )
            rows[-1] |= {f"published_{name}": value for name, value in done.published.items()}
            _tell(rows[-1])
            if arguments.per_class:
                title = f"{done.model}, {done.weights} weights, {done.data}"
                _print(console, [_printed(row) for row in per_output(done.predictions, done.images.class_names)], title)
            if arguments.out:
                predictions += _predictions(done)
    _print(console, [_printed(row) for row in rows], None)
    for path in arguments.table:
        write_rows(path, rows if path.endswith(".csv") else [_printed(row) for row in rows])
    if arguments.out:
        write_rows(arguments.out, predictions)


def _tell(row: dict) -> None:
    """Says that a row of the table is known; the next may take hours."""
    from tnt_jax.config import TASKS
    from tnt_jax.training.metrics import printed, title_of

    what = row.get("weights") or row["method"]
    told = ("attacked_top1", "insertion", *(metrics[0] for metrics in TASKS.values()))
    name = next(name for name in told if name in row)
    value = f"{title_of(name)} {printed(name, row[name])}"
    print(f"{row['model']}, {what}, {row['data']}: {value}", file=sys.stderr, flush=True)


def _refuse(arguments: Arguments, chosen: str, options: tuple[str, ...]) -> None:
    for option in options:
        if getattr(arguments, option):
            raise InputError(f"--{option.replace('_', '-')} is of the plain evaluation, and has no use with --{chosen}")


def _tables(arguments: Arguments, chosen: str) -> list:
    """The rows of every model, all opened before anything is computed."""
    if chosen == "probe":
        from tnt_jax.evaluation.evaluate import probe_model

        compute, options = probe_model, {"methods": arguments.probe}
    elif chosen == "attack":
        from tnt_jax.evaluation.attacks import read_epsilon
        from tnt_jax.evaluation.examine import attack_model

        compute, options = attack_model, {"attack": arguments.attack, "epsilon": read_epsilon(arguments.epsilon)}
        options |= {"steps": arguments.steps, "count": arguments.images, "out": arguments.attack_out}
        if arguments.attack_out and len(arguments.models) > 1:
            raise InputError(f"--attack-out takes the images of one model, and {len(arguments.models)} were given")
    else:
        from tnt_jax.evaluation.examine import explain_model

        compute = explain_model
        options = {"methods": arguments.explain, "size": arguments.size, "count": arguments.images}
    options |= {"batch_size": arguments.batch_size}
    return [compute(model, arguments.source, **options) for model in arguments.models]


NOT_PRINTED = ("macro_precision", "macro_recall")
"""Columns of the .csv table alone: a line for people has no room for them."""


def _printed(row: dict) -> dict[str, str]:
    """A row as people read it: a share in percent, and its interval behind it."""
    from tnt_jax.training.metrics import SHARES, title_of

    def text_of(name: str, value: float) -> str:
        if name in ("images", "training_images", "images_per_second"):
            return f"{value:,.0f}"
        is_share = name.removeprefix("published_").startswith(SHARES)
        return f"{100 * value:.2f}" if is_share else f"{value:.4f}"

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
        title = title_of(name.removeprefix("published_"))
        shown[f"published {title}" if is_published else title] = text
    return shown


def _predictions(done) -> list[dict]:
    """A row for each image: the truth and the prediction, by the task."""
    from tnt_jax.evaluation.predictions import LabelPredictions, ValuePredictions

    files, by_type = getattr(done.images, "files", None), {LabelPredictions: _of_labels, ValuePredictions: _of_values}
    rows = by_type.get(type(done.predictions), _of_classes)(done.predictions, done.images.class_names)
    of_run = {"model": done.model, "weights": done.weights, "data": done.data}
    return [{**of_run, "image": files[index] if files else index, **row} for index, row in enumerate(rows)]


def _of_classes(predictions, names) -> list[dict]:
    from tnt_jax.inference import class_name

    return [
        {
            "label": int(label),
            "class": class_name(label, names),
            "pred_label": int(top[0]),
            "pred_class": class_name(top[0], names),
            "pred_score": float(scores[0]),
            "top": " ".join(map(str, top)),
        }
        for label, top, scores in zip(predictions.labels, predictions.top, predictions.scores, strict=True)
    ]


def _of_labels(predictions, names) -> list[dict]:
    def listed(chosen) -> str:
        return "|".join(name for name, there in zip(names, chosen, strict=True) if there)

    return [
        {"classes": listed(truth > 0.5), "pred_classes": listed(predicted)}
        | {f"score_{name}": float(score) for name, score in zip(names, scores, strict=True)}
        for truth, predicted, scores in zip(predictions.labels, predictions.predicted, predictions.scores, strict=True)
    ]


def _of_values(predictions, names) -> list[dict]:
    return [
        {name: float(target) for name, target in zip(names, targets, strict=True)}
        | {f"pred_{name}": float(value) for name, value in zip(names, values, strict=True)}
        for targets, values in zip(predictions.targets, predictions.values, strict=True)
    ]


def _print(console: Console, rows: list[dict[str, str]], title: str | None) -> None:
    """A line for each row; where these are too wide, a column for each, of which models have their names above."""
    from tnt_jax.commands.tables import columns_of

    caption = "shares in percent; in brackets 95% intervals"
    names = columns_of(rows)
    widths = {name: max(len(line) for row in rows for line in _lines(name, row)) for name in names}
    widths |= {name: min(widths[name], MODEL_WIDTH) for name in ("model", "data") if name in widths}
    if sum(widths.values()) + 2 * len(names) > console.width and "model" in names and len(rows) <= MOST_COLUMNS:
        _print_columns(console, rows, names)
        return
    table = Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        words, long = name in ("model", "weights", "data", "method", "class", "target"), name in ("model", "data")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not long)
    for row in rows:
        table.add_row(*(row.get(name, "-").replace(" (", "\n(") for name in names))
    console.print(table, markup=False)


MODEL_WIDTH = 16
MOST_COLUMNS = 3


def _lines(name: str, row: dict[str, str]) -> list[str]:
    return [name, *row.get(name, "-").replace(" (", "\n(").splitlines()]


def _print_columns(console: Console, rows: list[dict[str, str]], names: list[str]) -> None:
    of_model = [name for name in ("model", "weights", "data") if name in names]
    table = Table(caption="shares in percent; in brackets 95% intervals", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column("\n".join(row.get(name, "-") for name in of_model), justify="right", overflow="fold")
    for name in names:
        if name not in of_model:
            table.add_row(name, *(row.get(name, "-") for row in rows))
    console.print(table, markup=False)
