"""Resizing, and affine maps: where the host spends its time. Pixel for pixel what Pillow does."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "height width channels"]


def resize(image: Pixels, size: tuple[int, int], interpolation: Image.Resampling) -> Pixels:
    """To `size` (height, width), with antialiasing."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.asarray(picture.resize(size[::-1], interpolation)).reshape(*size, -1)


def affine(image: Pixels, matrix: tuple[float, ...], interpolation: Image.Resampling, fill: int) -> Pixels:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f); what would come from outside is `fill`."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    fill = fill if image.shape[-1] == 1 else (fill,) * 3
    moved = picture.transform(picture.size, Image.Transform.AFFINE, matrix, interpolation, fillcolor=fill)
    return np.asarray(moved).reshape(image.shape)
