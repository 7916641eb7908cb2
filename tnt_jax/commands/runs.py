"""The runs below a folder: `tnt-runs runs`, or `python -m tnt_jax.commands.runs runs`."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Annotated

import tyro

from tnt_jax.commands.cli import command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Lists the runs below a folder: how far each has come, its best metric, and in what they differ."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = "runs"
    """The folder to look in."""
    table: str | None = None
    """Also write the table to this file: .csv, .jsonl or .md."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments, prog="tnt-runs")
    from tnt_jax.storage.files import check_ending

    if arguments.table:
        check_ending(arguments.table, (".csv", ".jsonl", ".md"), "a table")
    list_runs(arguments.folder, arguments.table)


def list_runs(folder: str, path: str | None = None) -> None:
    """Prints a line for each run below a folder, and writes them to a file.

    Raises:
        InputError: there are none.
    """
    from rich.console import Console

    from tnt_jax.commands.tables import print_rows, write_rows
    from tnt_jax.storage.places import place
    from tnt_jax.storage.run import by_role, is_run, read_config

    top = place(folder)
    if not top.is_dir():
        raise InputError(f"{folder} is not a folder")
    found = sorted(each for each in _folders(top) if is_run(each))
    runs, rows = {}, []
    for each in found:
        name = str(each.relative_to(top))
        try:
            runs[name] = {field: value for field, (value, _) in by_role(read_config(each)).items()}
            rows.append({"run": name} | _progress(each))
        except InputError as error:
            print(f"note: {error}")
    if not rows:
        raise InputError(f"{folder} holds no run")
    fields = {field for values in runs.values() for field in values}
    different = [field for field in sorted(fields) if len({repr(values.get(field)) for values in runs.values()}) > 1]
    rows = [row | {field: _text(runs[row["run"]].get(field)) for field in different} for row in rows]
    print_rows(Console(highlight=False), rows)
    if path:
        write_rows(path, rows)


def _folders(folder: pathlib.PurePath) -> Iterator[pathlib.PurePath]:
    """A folder and those below it, but not what lies in runs."""
    from tnt_jax.storage.run import is_run

    yield folder
    if not is_run(folder):
        for each in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            yield from _folders(each)


def _progress(path: pathlib.PurePath) -> dict[str, str]:
    """State, epoch, and the best metric of the averaged weights with its epoch."""
    from tnt_jax.storage.lock import is_held
    from tnt_jax.storage.reading import best_of, scores_of, steps_of
    from tnt_jax.storage.run import read_config
    from tnt_jax.visualize.runs import metric_of_run, read_metrics

    config, steps, scores = read_config(path), steps_of(path), scores_of(path)
    metric, epochs = metric_of_run(config), config.epochs + config.optimizer.cooldown_epochs
    try:
        train, test = read_metrics(path)
    except InputError:
        return {"state": "has not begun", "epoch": f"0/{epochs}"}
    epoch = max(line["epoch"] for line in train + test)
    ended = epoch >= epochs and bool(test) and test[-1]["epoch"] >= epochs
    state = "running" if is_held(path) else "finished" if ended else "stopped"
    row = {"state": state, "epoch": f"{epoch:.4g}/{epochs}"}
    best = best_of(steps, scores, metric.name)
    if best is not None:
        at = next((line["epoch"] for line in test if line["step"] == best), math.nan)
        row[f"best {metric.title}"] = metric.text(scores[best][f"ema_{metric.name}"])
        row["of epoch"] = f"{at:.4g}"
    return row


def _text(value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
