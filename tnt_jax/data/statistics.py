"""Mean and standard deviation of each channel over the training images.

python -m tnt_jax.data.statistics csv:mine.csv
"""

import dataclasses
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import tyro

from tnt_jax.config import DataConfig, InputError, check_data
from tnt_jax.data.crop import resized_to_fit
from tnt_jax.data.opening import open_split
from tnt_jax.data.samples import full_scale_of

SIDE = 256
"""Pixels: larger images are reduced to it first, which changes a deviation by what is finer than that."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of pixels between 0 (black) and 1 (white), for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    """The number of images that were measured."""

    @property
    def flags(self) -> str:
        """As train.py takes them."""
        values = [" ".join(f"{value:.6g}" for value in each) for each in (self.mean, self.std)]
        return f"--data.mean {values[0]} --data.std {values[1]}"


def measure(data: DataConfig, progress=lambda done, count: None) -> Statistics:
    """Mean and standard deviation of all training images of a source.

    Args:
        progress: called with the number of images that are done, and that there are.

    Raises:
        InputError: an image cannot be read, or has other channels than the first.
    """
    check_data(data)
    source = open_split(data, data.train_split)

    def sums(index: int) -> np.ndarray:
        pixels = source.read(index, None, (SIDE, SIDE))[0]
        values = resized_to_fit(pixels, SIDE).astype(np.float64) / full_scale_of(pixels.dtype)
        return np.stack([values.mean(axis=(0, 1)), (values**2).mean(axis=(0, 1))])

    total, count = None, len(source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for at in range(0, count, 256):
            for index, each in enumerate(pool.map(sums, range(at, min(at + 256, count))), at):
                if total is not None and each.shape != total.shape:
                    raise InputError(
                        f"{source.image_name(index)} has {each.shape[1]} channels, and the images before it "
                        f"{total.shape[1]}"
                    )
                total = each if total is None else total + each
                progress(index + 1, count)
    if total is None:
        raise InputError("there are no training images to measure")
    mean, square = total / count
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()), count)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures mean and standard deviation of each channel over the training images, and prints them as flags."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """As in --data.source of train.py."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data as train.py reads it."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m tnt_jax.data.statistics")
    import rich.progress
    from rich.console import Console

    try:
        with rich.progress.Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("images", total=None)
            made = measure(
                dataclasses.replace(arguments.data, source=arguments.source),
                lambda done, count: bar.update(task, completed=done, total=count),
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{made.images:,} images, {len(made.mean)} channels")
    print(made.flags)


if __name__ == "__main__":
    main()
