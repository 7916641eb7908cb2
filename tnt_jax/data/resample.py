"""Resizing, and affine maps: where the host spends its time. Pixel for pixel what Pillow does.

For RGB images, resample.c does it several times faster. Where there is no C compiler Pillow itself is called: the
pixels are the same.
"""

import ctypes
import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tnt_jax import c_compiler

Pixels = UInt8[np.ndarray, "_height _width _channels"]
SOURCE = pathlib.Path(__file__).with_suffix(".c")


def resize(
    image: Pixels,
    size: tuple[int, int],
    interpolation: Image.Resampling,
    region: tuple[int, int, int, int] | None = None,
) -> Pixels:
    """To `size` (height, width), bilinear or bicubic, with antialiasing.

    Args:
        region: top, left, height and width of what is wanted of the result; None for all of it. What lies outside of
            the resized image is black.
    """
    top, left, height, width = region or (0, 0, *size)
    inside = 0 <= top <= size[0] - height and 0 <= left <= size[1] - width
    library = _library() if image.shape[2] == 3 and inside else None
    if library is None:
        picture = to_pillow(image).resize(size[::-1], interpolation)
        picture = picture.crop((left, top, left + width, top + height)) if region else picture
        return np.asarray(picture).reshape(height, width, -1)
    if image.strides[1:] != (3, 1) or image.strides[0] < 0:
        image = np.ascontiguousarray(image)
    out = np.empty((height, width, 3), np.uint8)
    done = library.resize(
        ctypes.c_void_p(image.ctypes.data), ctypes.c_int64(image.strides[0]), *image.shape[:2],
        ctypes.c_void_p(out.ctypes.data), *size, top, left, height, width,
        interpolation == Image.Resampling.BICUBIC,
    )  # fmt: skip
    return _checked(done, out)


def affine(image: Pixels, matrix: tuple[float, ...], interpolation: Image.Resampling, fill: int) -> Pixels:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f); what would come from outside is `fill`."""
    library = _library() if image.shape[2] == 3 else None
    if library is None:
        colour = fill if image.shape[2] == 1 else (fill,) * 3
        picture = to_pillow(image)
        moved = picture.transform(picture.size, Image.Transform.AFFINE, matrix, interpolation, fillcolor=colour)
        return np.asarray(moved).reshape(image.shape)
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    done = library.affine(
        ctypes.c_void_p(image.ctypes.data), *image.shape[:2], ctypes.c_void_p(out.ctypes.data),
        (ctypes.c_double * 6)(*matrix), interpolation == Image.Resampling.BICUBIC, fill,
    )  # fmt: skip
    return _checked(done, out)


def mirror(image: Pixels) -> Pixels:
    """Left to right."""
    library = _library() if image.shape[2] == 3 else None
    if library is None:
        return np.ascontiguousarray(image[:, ::-1])
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    pixels = ctypes.c_int64(image.shape[0] * image.shape[1])
    library.mirror(ctypes.c_void_p(image.ctypes.data), pixels, image.shape[1], ctypes.c_void_p(out.ctypes.data))
    return out


def to_pillow(image: Pixels) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _checked(done: int, out: Pixels) -> Pixels:
    if not done:
        raise MemoryError("there is no memory left to resample an image")
    return out


def _library() -> ctypes.CDLL | None:
    """resample.c, compiled; None where that cannot be done."""
    # Without contraction, so that sums are rounded as Pillow's are.
    flags = ("-O3", "-ffp-contract=off") + (("-mavx2",) if "avx2" in c_compiler.processor_flags() else ())
    return c_compiler.library(SOURCE, flags, without="preparing images takes up to twice as long")
