"""A model for other runtimes: `python export.py MODEL --format stablehlo|onnx [--out FILE]`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tnt_jax.commands.cli import Flag, command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a model as a file that needs none of this code, with a .json beside it that says how to feed it."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a training run or of a model, or a published name."""
    format: Literal["stablehlo", "onnx"]
    """StableHLO, which JAX loads without this code, or ONNX."""
    out: str | None = None
    """File to write; by default the name of the folder with .stablehlo or .onnx."""
    overwrite: Flag = False
    """Replace files that exist."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.export import SUFFIXES, export_model
    from tnt_jax.storage.load import load_model

    out = arguments.out or Path(arguments.model).name + SUFFIXES[arguments.format]
    done = export_model(load_model(arguments.model), out, arguments.format, overwrite=arguments.overwrite)
    print(f"{done.path}: {done.size:,} bytes; its logits and the model's differ by {done.difference:.1e} at most")
    for limit in done.limits:
        print(f"note: {limit}")
