"""Takes weights of TNT in any published layout, and gives them back in any.

To a model folder: `python convert_torch_weights.py MODEL FOLDER`. To a checkpoint: `... MODEL FILE --to timm`.
"""

import dataclasses
import re
from typing import Annotated, Literal

import tyro

from tnt_jax.commands.cli import Flag, command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes any MODEL as a model folder, or with --to as a checkpoint that PyTorch reads."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint file (.pth, .safetensors ...), a published name, OWNER/NAME on the Hugging Face hub, an https://
    address, or the folder of a model or a run."""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """The model folder to write; with --to, a .safetensors or .pth file."""
    to: Literal["huawei", "timm", "mmpretrain", "transformers"] | None = None
    """The layout to write; transformers is for a model of head detr_unpooled."""
    image_size: str | None = None
    """Resize the sentence positions for images of this size: 384, or height and width as 256x320."""
    in_channels: int | None = None
    """Adapt the first filters to images of so many channels."""
    num_classes: int | None = None
    """Classes of the head: a fresh one where the model's has another number, none for 0."""
    class_names: str | None = None
    """A file with the names of the classes, one a line or JSON; or imagenet-1k."""
    mean: tuple[float, ...] | None = None
    """Of each channel, between 0 and 1: what is subtracted from a pixel."""
    std: tuple[float, ...] | None = None
    """Of each channel, between 0 and 1: what it is divided by then."""
    crop: float | None = None
    """Share of the shorter side that evaluation keeps."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """The filter by which images are resized."""
    weights: Literal["raw", "ema"] | None = None
    """The weights of a training checkpoint; by default the averaged ones where there are any."""
    overwrite: Flag = False
    """Replace a destination that exists."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    if arguments.to is None:
        _to_folder(arguments)
    else:
        _to_checkpoint(arguments)


def _to_folder(arguments: Arguments) -> None:
    from tnt_jax.data.classes import read_class_names
    from tnt_jax.storage.convert import convert

    done = convert(
        arguments.source,
        arguments.destination,
        image_size=None if arguments.image_size is None else parse_image_size(arguments.image_size),
        in_channels=arguments.in_channels,
        num_classes=arguments.num_classes,
        weights=arguments.weights,
        class_names=None if arguments.class_names is None else read_class_names(arguments.class_names),
        **{name: getattr(arguments, name) for name in ("mean", "std", "crop", "interpolation", "overwrite")},
    )
    config, names = done.description.config, done.description.class_names
    if done.layout:
        print(f"layout        {done.layout}")
    print(f"architecture  {config.architecture}")
    print(f"variant       {config.name}")
    print("image size    {}x{}".format(*config.image_size))
    print(f"channels      {config.in_channels}")
    print(f"classes       {config.num_classes}" + (f", {names[0]} to {names[-1]}" if names else ""))
    if done.tensors:
        print(f"tensors read  {done.tensors}, every one accounted for")
    for note in done.notes:
        print(f"note          {note}")
    print(f"written       {arguments.destination}")


def _to_checkpoint(arguments: Arguments) -> None:
    from tnt_jax.storage.load import load_model
    from tnt_jax.storage.torch.write import export

    for option in ("image_size", "in_channels", "num_classes", "class_names", "mean", "std", "crop", "interpolation"):
        if getattr(arguments, option) is not None:
            raise InputError(
                f"--{option.replace('_', '-')} is for writing a model folder, and --to writes a checkpoint"
            )
    model = load_model(arguments.source, weights=arguments.weights)
    tensors = export(model, arguments.destination, arguments.to, overwrite=arguments.overwrite)
    print(
        f"written       {arguments.destination}: {tensors} tensors of {model.config.name} as {arguments.to} names them"
    )


def parse_image_size(text: str) -> tuple[int, int]:
    """`384` or `256x320` (height x width) as height and width.

    Raises:
        InputError: it is neither.
    """
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})?", text):
        raise InputError(f"image size {text!r} should be a number such as 384, or height and width such as 256x320")
    sides = text.split("x")
    return int(sides[0]), int(sides[-1])
