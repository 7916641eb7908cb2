"""Resizing, and affine maps: where the host spends its time. Pixel for pixel what Pillow does.

For RGB images of 8 bits, resample.c does it several times faster. For all others, and where there is no C compiler,
Pillow itself is called: the pixels are the same.
"""

import ctypes
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from tnt_jax import c_compiler
from tnt_jax.data.samples import Pixels

SOURCE = pathlib.Path(__file__).with_suffix(".c")


LARGEST_RESIZED = 2**25
"""Pixels of an image that is resized as a whole; of a larger one only what is wanted is."""


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
    if inside and region and math.prod(size) > LARGEST_RESIZED:
        return _resize_part(image, size, interpolation, region)
    library = _library() if inside and _is_rgb(image) else None
    if library is None:

        def resized(picture: Image.Image) -> Image.Image:
            whole = picture.resize(size[::-1], interpolation)
            return whole.crop((left, top, left + width, top + height)) if region else whole

        return _by_pillow(image, resized)
    if image.strides[1:] != (3, 1) or image.strides[0] < 0:
        image = np.ascontiguousarray(image)
    out = np.empty((height, width, 3), np.uint8)
    done = library.resize(
        ctypes.c_void_p(image.ctypes.data), ctypes.c_int64(image.strides[0]), *image.shape[:2],
        ctypes.c_void_p(out.ctypes.data), *size, top, left, height, width,
        interpolation == Image.Resampling.BICUBIC,
    )  # fmt: skip
    return _checked(done, out)


def _resize_part(
    image: Pixels, size: tuple[int, int], interpolation: Image.Resampling, region: tuple[int, int, int, int]
) -> Pixels:
    """A region of the resized image from the pixels that it depends on, in memory in proportion to both.

    Pillow rounds the corners of the region to float32, so that a pixel may differ by a rounding from the whole.
    """
    cuts, box = [], []
    for side, to, first, length in zip(image.shape[:2], size, region[:2], region[2:], strict=True):
        scale = side / to
        margin = math.ceil(2 * max(scale, 1)) + 1  # bicubic reaches two pixels
        low = max(0, math.floor(first * scale) - margin)
        high = min(side, math.ceil((first + length) * scale) + margin)
        cuts.append(slice(low, high))
        box.append((max(0.0, first * scale - low), min(float(high - low), (first + length) * scale - low)))
    (top, bottom), (left, right) = box
    return _by_pillow(
        image[tuple(cuts)],
        lambda picture: picture.resize(region[:1:-1], interpolation, (left, top, right, bottom)),
    )


def affine(image: Pixels, matrix: tuple[float, ...], interpolation: Image.Resampling, fill: Sequence[float]) -> Pixels:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f).

    Args:
        fill: of each channel what would come from outside.
    """
    library = _library() if _is_rgb(image) else None
    if library is None:
        fills = iter(fill)

        def moved(picture: Image.Image) -> Image.Image:
            colour = tuple(fill) if picture.mode == "RGB" else next(fills)
            return picture.transform(picture.size, Image.Transform.AFFINE, matrix, interpolation, fillcolor=colour)

        return _by_pillow(image, moved)
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    done = library.affine(
        ctypes.c_void_p(image.ctypes.data), *image.shape[:2], ctypes.c_void_p(out.ctypes.data),
        (ctypes.c_double * 6)(*matrix), interpolation == Image.Resampling.BICUBIC, (ctypes.c_uint8 * 3)(*fill),
    )  # fmt: skip
    return _checked(done, out)


def _is_rgb(image: Pixels) -> bool:
    """True for an image that resample.c is made for."""
    return image.shape[2] == 3 and image.dtype == np.uint8


def _by_pillow(image: Pixels, operation: Callable[[Image.Image], Image.Image]) -> Pixels:
    """RGB and grey of 8 bits as they are; of other images each channel, of other types as floats, rounded after it."""
    if image.dtype == np.uint8 and image.shape[2] in (1, 3):
        return from_pillow(operation(to_pillow(image)))
    kind = np.uint8 if image.dtype == np.uint8 else np.float32
    channels = [
        np.asarray(operation(Image.fromarray(np.ascontiguousarray(image[..., channel], kind))))
        for channel in range(image.shape[2])
    ]
    moved = np.stack(channels, axis=2)
    if image.dtype == np.uint16:
        moved = np.clip(np.round(moved), 0, 65535)
    return moved.astype(image.dtype, copy=False)


def mirror(image: Pixels) -> Pixels:
    """Left to right."""
    library = _library() if _is_rgb(image) else None
    if library is None:
        return np.ascontiguousarray(image[:, ::-1])
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    pixels = ctypes.c_int64(image.shape[0] * image.shape[1])
    library.mirror(ctypes.c_void_p(image.ctypes.data), pixels, image.shape[1], ctypes.c_void_p(out.ctypes.data))
    return out


def to_pillow(image: Pixels) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def from_pillow(picture: Image.Image) -> Pixels:
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def _checked(done: int, out: Pixels) -> Pixels:
    if not done:
        raise MemoryError("there is no memory left to resample an image")
    return out


def _library() -> ctypes.CDLL | None:
    """resample.c, compiled; None where that cannot be done."""
    # Without contraction, so that sums are rounded as Pillow's are.
    flags = ("-O3", "-ffp-contract=off") + (("-mavx2",) if "avx2" in c_compiler.processor_flags() else ())
    return c_compiler.library(SOURCE, flags, without="preparing images takes up to twice as long")
