"""Names what images show: `python predict.py MODEL IMAGE_OR_FOLDER ... [--top-k 5] [--json] [--batch-size 32]`."""

import dataclasses
import json
import os
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tnt_jax.cli import run_command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Names what images show. Images that cannot be read are reported, and the exit code is 2 if there were any."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model, or a published name."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE_OR_FOLDER ...")]
    """Image files, and folders that are searched for images."""
    top_k: int = 5
    """How many of the most likely classes to print."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a line of JSON for each image instead of a table."""
    batch_size: int = 32
    """Images that are computed together."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.data.images import list_images
    from tnt_jax.inference import load_model, most_likely, predict_images
    from tnt_jax.models.saving import description_of

    if arguments.top_k < 1 or not arguments.images:
        raise InputError("top_k must be at least 1" if arguments.images else "no images were given")
    model = load_model(arguments.model)
    class_names = description_of(model).class_names
    paths, failures = [], []
    for path in arguments.images:
        try:
            paths += map(str, list_images(path)) if os.path.isdir(path) else [path]
        except InputError as error:
            failures.append(error)
    console = Console()
    for path, result in zip(paths, predict_images(model, paths, batch_size=arguments.batch_size), strict=True):
        if isinstance(result, InputError):
            failures.append(result)
        elif arguments.json:
            top = most_likely(result, class_names, arguments.top_k)
            summary = {name: result[name] for name in ("pred_label", "pred_class", "pred_score")}
            print(json.dumps({"image": path, **summary, "top": top}, ensure_ascii=False))
        else:
            console.print(path, markup=False, highlight=False, soft_wrap=True)
            console.print(_table(most_likely(result, class_names, arguments.top_k)))
    if failures:
        raise InputError("\n".join(map(str, failures)))


def _table(top: list[dict]) -> Table:
    table = Table()
    table.add_column("probability", justify="right")
    table.add_column("label", justify="right")
    table.add_column("class")
    for row in top:
        table.add_row(f"{row['score']:.2%}", str(row["label"]), escape(row["class"]))
    return table


if __name__ == "__main__":
    run_command(main)
