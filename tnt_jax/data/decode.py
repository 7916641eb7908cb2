"""The content of an image file to pixels: simplejpeg for ordinary JPEGs, Pillow for all else, with the same result."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from tnt_jax.config import InputError
from tnt_jax.data.images import open_image
from tnt_jax.data.resample import Pixels

ORIENTATION = 0x0112
LARGEST = 100_000_000
"""Pixels. What claims to be larger is taken for a decompression bomb, and refused before it is decoded."""


def decode(content: bytes, name: str) -> Pixels:
    """RGB pixels of an image file, upright.

    Args:
        content: the bytes of the file.
        name: the file, for the error.

    Raises:
        InputError: this is no image, or a damaged one; the message names it and says why.
    """
    if not content:
        raise InputError(f"{name} cannot be read as an image: it is empty")
    if content.startswith(b"\xff\xd8\xff") and not _is_turned(content):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            # Pillow converts CMYK in another way, and it is the reference.
            if colours in ("YCbCr", "RGB", "Gray") and height * width <= LARGEST:
                return simplejpeg.decode_jpeg(content)
        except ValueError:
            pass  # Pillow reads it too, or says what is wrong
    file = io.BytesIO(content)
    file.name = name
    return np.asarray(open_image(file))


def _is_turned(content: bytes) -> bool:
    """Whether the EXIF data of a JPEG ask for the image to be turned or mirrored."""
    if b"Exif\0\0" not in content[:65_536]:
        return False
    try:
        return Image.open(io.BytesIO(content)).getexif().get(ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF data raise nearly everything
        return True  # Pillow decides
