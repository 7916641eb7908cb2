"""The content of an image file to pixels: simplejpeg for ordinary JPEGs, Pillow for all else, with the same result."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from tnt_jax.config import InputError
from tnt_jax.data.images import LARGEST, open_image
from tnt_jax.data.resample import Pixels

ORIENTATION = 0x0112


def decode(content: bytes, name: str, at_least: tuple[int, int] | None = None) -> Pixels:
    """RGB pixels of an image file, upright.

    Args:
        content: the bytes of the file.
        name: the file, for the error.
        at_least: height and width. A JPEG that is twice as large, or 4 or 8 times, is decoded at that fraction of its
            size: much faster, but not with the pixels that resizing it would give.

    Raises:
        InputError: this is no image, or a damaged one; the message names it and says why.
    """
    if not content:
        raise InputError(f"{name} cannot be read as an image: it is empty")
    if content.startswith(b"\xff\xd8\xff") and not _has_orientation(content):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            # Pillow converts CMYK in another way, and it is the reference.
            if colours in ("YCbCr", "RGB", "Gray") and height * width <= LARGEST:
                return simplejpeg.decode_jpeg(content, **_scaled_down(height, width, at_least))
        except ValueError:
            pass  # Pillow reads it too, or says what is wrong
    file = io.BytesIO(content)
    file.name = name
    return np.asarray(open_image(_drafted(file, at_least) if at_least else file))


def _scaled_down(height: int, width: int, at_least: tuple[int, int] | None) -> dict[str, int]:
    """simplejpeg's arguments for the smallest of 1, 1/2, 1/4 and 1/8 of the size that is large enough."""
    if not at_least:
        return {}
    factor = next((n for n in (8, 4, 2) if height >= n * at_least[0] and width >= n * at_least[1]), 1)
    return {"min_height": -(-height // factor), "min_width": -(-width // factor)}


def _drafted(file: io.BytesIO, at_least: tuple[int, int]) -> Image.Image | io.BytesIO:
    """The same by Pillow. What is no image stays a file, and is refused as such."""
    try:
        picture = Image.open(file)
        picture.name = file.name  # for the error
        picture.draft("RGB", (max(at_least),) * 2)  # the image may lie on its side
        return picture
    except Exception:
        file.seek(0)
        return file


def _has_orientation(content: bytes) -> bool:
    """Whether the EXIF data of a JPEG ask for the image to be rotated or mirrored."""
    if content.find(b"Exif\0\0", 0, 65_536) < 0:
        return False
    try:
        return Image.open(io.BytesIO(content)).getexif().get(ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF data raise nearly everything
        return True  # Pillow decides
