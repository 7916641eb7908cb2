"""Takes PyTorch weights of TNT in any published layout, and gives them back in any.

To a model of ours: `python convert_torch_weights.py SOURCE FOLDER`. From one: `... FOLDER FILE --to timm`.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

from tnt_jax.commands.cli import Flag, command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Converts a PyTorch checkpoint into a model folder, or with --to a model folder into a PyTorch checkpoint."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A .pth, .pth.tar, .pt, .bin or .safetensors file or a name on the Hugging Face hub; with --to, a model folder."""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """The model folder to write; with --to, a .safetensors or .pth file."""
    to: Literal["huawei", "timm", "mmpretrain"] | None = None
    """The layout to write."""
    image_size: str | None = None
    """Resize the sentence positions for images of this size: 384, or height and width as 256x320."""
    num_classes: int | None = None
    """Classes of the head: a fresh one where the checkpoint's has another number, none for 0."""
    weights: Literal["raw", "ema"] | None = None
    """Which weights of a training checkpoint; by default the averaged ones where there are any."""
    overwrite: Flag = False
    """Replace a destination that exists."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    if arguments.to is None:
        _read(arguments)
    else:
        _write(arguments)


def _read(arguments: Arguments) -> None:
    from tnt_jax.storage.torch.convert import convert, parse_image_size

    done = convert(
        arguments.source,
        arguments.destination,
        image_size=None if arguments.image_size is None else parse_image_size(arguments.image_size),
        num_classes=arguments.num_classes,
        weights=arguments.weights,
        overwrite=arguments.overwrite,
    )
    print(f"layout        {done.layout}")
    print(f"architecture  {done.config.architecture}")
    print(f"variant       {done.config.name}")
    print("image size    {}x{}".format(*done.config.image_size))
    print(f"classes       {done.config.num_classes}")
    print(f"tensors read  {done.tensors}, every one accounted for")
    for note in done.notes:
        print(f"note          {note}")
    print(f"written       {arguments.destination}")


def _write(arguments: Arguments) -> None:
    from tnt_jax.storage.load import load_model
    from tnt_jax.storage.torch.convert import export

    for option in ("image_size", "num_classes", "weights"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option.replace('_', '-')} is for reading a checkpoint, and --to writes one")
    model = load_model(arguments.source)
    tensors = export(model, arguments.destination, arguments.to, overwrite=arguments.overwrite)
    print(
        f"written       {arguments.destination}: {tensors} tensors of {model.config.name} as {arguments.to} names them"
    )
