"""The crop of evaluation: timm's, pixel for pixel."""

import math
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.decode import ImageSource, Reading, name_of_image, read_image
from tnt_jax.data.resample import resize
from tnt_jax.data.samples import Pixels, to_channels


@runtime_checkable
class Cropping(Protocol):
    """The part of a model's preprocessing that is done on the host."""

    image_size: tuple[int, int]
    crop: float
    interpolation: str
    white: float | None


def evaluated(image: ImageSource, channels: int, by: Cropping, max_pixels: int = DataConfig.max_pixels) -> Pixels:
    """An image as evaluation feeds it to a model of so many channels, not yet normalised.

    Raises:
        InputError: it cannot be read, or has other channels.
    """
    at_least = tuple(round(2 * side / by.crop) for side in by.image_size)
    pixels = read_image(image, channels, at_least=at_least, reading=Reading(by.white, max_pixels))
    try:
        return evaluation_crop(to_channels(pixels, channels), by.image_size, by.crop, by.interpolation)
    except InputError as error:
        raise InputError(f"{name_of_image(image)}: {error}") from error
    except MemoryError as error:
        raise InputError(f"{name_of_image(image)}: there is not enough memory to resize it") from error


def evaluation_crop(
    image: Image.Image | Pixels, size: tuple[int, int], crop: float, interpolation: str = "bicubic"
) -> Pixels:
    """The view of an image in evaluation: resized (antialiased) until it covers size / crop, and cut at its centre.

    Source: timm/data/transforms_factory.py, transforms_imagenet_eval with its default crop mode, and the Resize and
    CenterCrop of torchvision, rounding included.

    Args:
        size: height and width of the result.
        crop: share of the shorter side that is kept, above 0 and at most 1.
        interpolation: bicubic or bilinear.
    """
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    width, height = _resized_size(pixels.shape[1::-1], size, crop)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return resize(pixels, (height, width), Image.Resampling[interpolation.upper()], (top, left, *size))


def resized_to_fit(pixels: Pixels, side: int) -> Pixels:
    """The whole picture, its longer side reduced to `side` if it is longer."""
    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    return resize(pixels, (height, width), Image.Resampling.BILINEAR)


def _resized_size(image_size: tuple[int, int], size: tuple[int, int], crop: float) -> tuple[int, int]:
    """Width and height, as PIL orders them."""
    width, height = image_size
    to_height, to_width = (math.floor(side / crop) for side in size)
    if to_height != to_width:
        ratio = min(height / to_height, width / to_width)
        return round(width / ratio), round(height / ratio)
    if width <= height:
        return to_width, int(to_width * height / width)
    return int(to_height * width / height), to_height
