"""Reads every image of a dataset once: `tnt-check SOURCE`, or `python -m tnt_jax.commands.check SOURCE`."""

import csv
import dataclasses
import io
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import tyro

from tnt_jax.commands.cli import command
from tnt_jax.config import DataConfig, InputError, check_data

SHOWN = 20
AT_A_TIME = 64
"""Images that a thread reads before it takes the next ones."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Reads every image of all splits once, on all cores, and lists what cannot be read, and why."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """As in --data.source of train.py."""
    out: str | None = None
    """CSV file for the list: split, image, reason."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data as train.py reads it."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments, prog="tnt-check")
    import rich.progress
    from rich.console import Console

    from tnt_jax.storage.files import write_text

    data = dataclasses.replace(arguments.data, source=arguments.source)
    check_data(data)
    splits, wrong, columns = _splits(data), [], ("split", "image", "reason")
    with rich.progress.Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("images", total=sum(map(len, splits)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for split in splits:
                wrong += _wrong(split, pool, lambda count: bar.advance(task, count))
    if arguments.out:
        table = io.StringIO()
        csv.writer(table).writerows([columns, *wrong])
        write_text(arguments.out, table.getvalue())
    for split, _, reason in wrong[:SHOWN]:
        print(f"{split}: {reason}")
    if len(wrong) > SHOWN:
        print(f"and {len(wrong) - SHOWN:,} more" + ("" if arguments.out else "; --out FILE.csv has all"))
    counts = ", ".join(f"{len(split):,} of {split.name}" for split in splits)
    print(f"{counts}: {f'{len(wrong):,} cannot be read' if wrong else 'all can be read'}")
    if wrong:
        sys.exit(1)


def _splits(data: DataConfig) -> list:
    """The splits that are trained on, choose and are reported, each once."""
    from tnt_jax.data.opening import open_reported, open_split

    found = [open_split(data, data.train_split)]
    for read in (lambda: open_split(data, None), lambda: open_reported(data)):
        try:
            split = read()
        except InputError as error:
            print(f"note: {error}", file=sys.stderr)
            continue
        if split.name not in {each.name for each in found}:
            found.append(split)
    return found


def _wrong(split, pool: ThreadPoolExecutor, advance) -> list[tuple[str, str, str]]:
    """Split, image and reason of each image that cannot be read."""

    def of_some(first: int) -> list[tuple[str, str, str]]:
        found, indices = [], range(first, min(first + AT_A_TIME, len(split)))
        for index in indices:
            try:
                split.read(index)
            except InputError as error:
                found.append((split.name, split.image_name(index), str(error)))
        advance(len(indices))
        return found

    return list(itertools.chain.from_iterable(pool.map(of_some, range(0, len(split), AT_A_TIME))))


if __name__ == "__main__":
    main()
