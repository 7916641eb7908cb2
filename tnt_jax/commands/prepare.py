"""Writes a dataset in the form that trains fastest: `python -m tnt_jax.commands.prepare imagenet --train ...`."""

import dataclasses
from typing import Annotated

import tyro

from tnt_jax.commands.cli import command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a dataset in the form that trains fastest. There is one: `imagenet`."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="imagenet")]
    """The dataset to prepare."""
    train: str
    """ILSVRC2012_img_train.tar."""
    val: str
    """ILSVRC2012_img_val.tar."""
    out: str
    """Folder to write to; it takes as much space as the archives, 145 GB."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m tnt_jax.commands.prepare")
    if arguments.dataset != "imagenet":
        raise InputError(f"there is no dataset {arguments.dataset!r} to prepare; there is imagenet")
    from tnt_jax.data.prepare import imagenet_archives, prepare_imagenet

    folder = prepare_imagenet(arguments.train, arguments.val, arguments.out, imagenet_archives())
    print(f"{folder} is complete. Train on it with --data.source array_record:{folder}")


if __name__ == "__main__":
    main()
