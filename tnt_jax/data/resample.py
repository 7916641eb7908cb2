"""Resizing, and affine maps: where the host spends its time. Pixel for pixel what Pillow does."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "height width channels"]


def resize(
    image: Pixels,
    size: tuple[int, int],
    interpolation: Image.Resampling,
    region: tuple[int, int, int, int] | None = None,
) -> Pixels:
    """To `size` (height, width), with antialiasing.

    Args:
        region: top, left, height and width of what is wanted of the result; None for all of it. What lies outside of
            the resized image is black.
    """
    top, left, height, width = region or (0, 0, *size)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).resize(size[::-1], interpolation)
    if region:
        picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture).reshape(height, width, -1)


def affine(image: Pixels, matrix: tuple[float, ...], interpolation: Image.Resampling, fill: int) -> Pixels:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f); what would come from outside is `fill`."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    fill = fill if image.shape[-1] == 1 else (fill,) * 3
    moved = picture.transform(picture.size, Image.Transform.AFFINE, matrix, interpolation, fillcolor=fill)
    return np.asarray(moved).reshape(image.shape)
