"""Accuracy of a model over every test image: `python eval.py MODEL [--source SOURCE] [--batch-size 64]`."""

import dataclasses
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from tnt_jax.cli import run_command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prints how many of the test images a model gets right, each image counted once."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a training run (its averaged and its raw weights are evaluated), of a model, or a published name."""
    source: str | None = None
    """Where the images come from, such as `digits` or `idx:FOLDER`; a training run knows its own."""
    batch_size: int = 64
    """Images that are computed together, over all devices."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.evaluation import evaluate_model

    table = Table("weights", "images", "top-1", "top-5", "loss", title=arguments.model)
    for weights, scores in evaluate_model(arguments.model, arguments.source, batch_size=arguments.batch_size):
        top = (f"{scores['top1']:.2%}", f"{scores['top5']:.2%}")
        table.add_row(weights, f"{scores['count']:,}", *top, f"{scores['loss']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
