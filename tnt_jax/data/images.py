"""An image file to pixels, and pixels to what evaluation feeds: timm's evaluation, pixel for pixel."""

import io
import math
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps

from tnt_jax.config import InputError
from tnt_jax.data.resample import Pixels, resize

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
LARGEST = 100_000_000
"""Pixels. What claims to be larger is taken for a decompression bomb, and refused before it is decoded."""


@runtime_checkable
class SupportsArray(Protocol):
    """An array of JAX, PyTorch or another library."""

    def __array__(self) -> np.ndarray: ...


ImageSource = str | os.PathLike | bytes | bytearray | memoryview | io.IOBase | BinaryIO | Image.Image | SupportsArray
"""What an image is read from."""


def open_image(source: ImageSource, channels: int = 3) -> Image.Image:
    """An image in RGB (3 channels) or grey (1), rotated upright as its EXIF orientation says.

    What is not RGB is made so by PIL's `convert`, as in timm: grey and palettes are written out, CMYK is converted, and
    alpha is dropped, which shows the colour beneath it. Of 16-bit samples the high byte is taken, where
    `convert` would cut off everything above 255. Of an animation it is the first picture.

    Args:
        source: path, bytes of a file, open binary file, PIL image, or uint8 array (height, width[, channels]) of NumPy,
            JAX or PyTorch.

    Raises:
        InputError: there is no such file, or it cannot be read as an image; the message says which and why.
    """
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", None) or "the image"
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    elif hasattr(source, "__array__") and not isinstance(source, Image.Image):
        source = _from_array(np.asarray(source.detach().cpu() if hasattr(source, "detach") else source))
    elif not isinstance(source, str | os.PathLike | Image.Image) and not hasattr(source, "read"):
        raise InputError(
            f"{source!r:.80} is no image; one is a path, bytes, an open file, a PIL image, or a uint8 array "
            "(height, width, channels)"
        )
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        _refuse_bomb(image.size)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError as error:
        raise InputError(f"there is no image {name}") from error
    except Exception as error:  # decoders raise nearly everything for a damaged file
        raise InputError(f"{name} cannot be read as an image: {_reason(error, source)}") from error


def _refuse_bomb(size: tuple[int, int]) -> None:
    if math.prod(size) > LARGEST:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels: could be a decompression bomb; at most {LARGEST:,} are decoded"
        )


def _from_array(array: np.ndarray) -> Image.Image:
    first = array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))):
        raise InputError(
            f"an image of shape {array.shape} and dtype {array.dtype} was given, and should be uint8 "
            "(height, width) or (height, width, channels) with 1, 3 or 4 channels"
            + ("; its channels are first: transpose them, as in image.transpose(1, 2, 0)" if first else "")
        )
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _reason(error: Exception, source: ImageSource) -> str:
    if isinstance(source, str | os.PathLike) and os.path.isfile(source) and not os.path.getsize(source):
        return "it is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not in a format that Pillow knows"
    return str(error) or type(error).__name__


def evaluation_crop(
    image: Image.Image | Pixels, size: tuple[int, int], crop: float, interpolation: str = "bicubic"
) -> Pixels:
    """What evaluation shows of an image: resized (antialiased) until it covers size / crop, and cut at its centre.

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


def images_below(folder: str | os.PathLike) -> Iterator[str]:
    """The paths of all images in a folder and the folders in it, by their suffix, as they are asked for.

    Names are in order, numbers in them ordered as numbers. One folder at a time is listed, so that the first image of
    millions is there as soon as its own folder has been read. Links are followed, to every folder once.

    Raises:
        InputError: there is no such folder; or, at the end, no image was in it.
    """
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {folder}")
    found = False
    for path in _walk(os.fspath(folder), set()):
        found = True
        yield path
    if not found:
        raise InputError(f"there is no image in {folder}; known are {', '.join(SUFFIXES)}")


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    identity = os.stat(folder)
    if (identity.st_dev, identity.st_ino) in seen:  # a link to where the walk has been
        return
    seen.add((identity.st_dev, identity.st_ino))
    with os.scandir(folder) as entries:
        names = {
            entry.name: entry.is_dir()
            for entry in entries
            if not entry.name.startswith(".") and (entry.name.lower().endswith(SUFFIXES) or entry.is_dir())
        }
    for name in sorted(names, key=natural_key):
        path = os.path.join(folder, name)
        if names[name]:
            yield from _walk(path, seen)
        elif os.path.isfile(path):
            yield path


def natural_key(name: str) -> list:
    """Sorts `b2` before `b10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
