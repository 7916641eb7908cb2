"""Augmentation of one training image on the host: random crop or jitter, shift, flip, RandAugment, 3-Augment, colours.

Every function takes pixels (height, width, channels) and returns new ones. What moves pixels is for images of any type
and number of channels; what changes colours is for 1 and 3 channels of 8 bits, and leaves others as they are. All that
is random is drawn from the generator that is passed in, as often for the ones as for the others.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tnt_jax.config import DataConfig
from tnt_jax.data.moving import Places, fitted
from tnt_jax.data.resample import affine, from_pillow, mirror, resize, to_pillow
from tnt_jax.data.samples import Pixels, full_scale_of
from tnt_jax.tasks.table import TASKS


def augment(image: Pixels, data: DataConfig, size: tuple[int, int], rng: np.random.Generator) -> tuple[Pixels, Places]:
    """A training image of `size` (height, width) from a whole one, and where its pixels come from.

    Of a dense task only what `Places` can say moves pixels: RandAugment leaves out its `GEOMETRY`.
    """
    image, places = move(image, data, size, rng)
    if data.auto_augment == "3a":
        image = three_augment(image, rng)
    elif data.randaugment_ops:
        return randaugment(image, data, rng), places
    jitters = data.color_jitter and has_colours(image)
    return color_jitter(image, data.color_jitter, rng) if jitters else image, places


def move(image: Pixels, data: DataConfig, size: tuple[int, int], rng: np.random.Generator) -> tuple[Pixels, Places]:
    """The part of `augment` that moves what is told of pixels too: crop or large-scale jitter, shift, flip."""
    if data.simple_crop:
        image, places = simple_random_crop(image, data, size, rng)
    elif data.crop_area:
        image, places = random_resized_crop(image, data, size, rng)
    elif data.scale_jitter:
        image, places = scale_jitter(image, data, size, rng)
    elif TASKS[data.task].dense:
        image, places = fitted(image, size, draw_interpolation(data, rng), fill_of(image, data))
    else:
        places = Places.of_box((0, 0, *image.shape[:2]), image.shape[:2])
    if data.random_shift:
        image, places = random_shift(image, places, data.random_shift, rng)
    if rng.random() < data.random_flip:
        image, places = mirror(image), places.mirrored()
    return image, places


def random_resized_crop(
    image: Pixels, data: DataConfig, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Pixels, Places]:
    """Cuts out a rectangle of random area and aspect and resizes it.

    Source: timm's RandomResizedCropAndInterpolation.
    """
    top, left, height, width = box = crop_box(*image.shape[:2], data, rng)
    part = image[top : top + height, left : left + width]
    return resize(part, size, draw_interpolation(data, rng)), Places.of_box(box, size)


def scale_jitter(
    image: Pixels, data: DataConfig, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Pixels, Places]:
    """Large-scale jitter (arXiv 2012.07177): the whole image times a random factor, at a random place."""
    factor, at = rng.uniform(*data.scale_jitter), (rng.random(), rng.random())
    return fitted(image, size, draw_interpolation(data, rng), fill_of(image, data), factor=factor, at=at)


def crop_box(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, in pixels.

    After ten draws that do not fit into the image it is the largest box in the middle whose aspect is allowed.
    """
    least, most = data.crop_aspect
    for _ in range(10):
        area = rng.uniform(*data.crop_area) * height * width
        aspect = math.exp(rng.uniform(math.log(least), math.log(most)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        # timm lets a side round to 0 here, and fails on images of a few pixels.
        if 1 <= crop_width <= width and 1 <= crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width, crop_height = min(width, round(height * most)), min(height, round(width / least))
    return (height - crop_height) // 2, (width - crop_width) // 2, max(1, crop_height), max(1, crop_width)


def simple_random_crop(
    image: Pixels, data: DataConfig, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Pixels, Places]:
    """A place in the whole image at the size of the input. Source: DeiT III's Resize and RandomCrop(padding=4)."""
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    whole = max(size[0], int(height * scale)), max(size[1], int(width * scale))
    places = Places.of_box((0, 0, height, width), whole)
    image = np.pad(resize(image, whole, draw_interpolation(data, rng)), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    top, left = (int(rng.integers(0, side + 8 - wanted + 1)) for side, wanted in zip(whole, size, strict=True))
    part = image[top : top + size[0], left : left + size[1]]
    return part, places.take(np.arange(size[0]) + top - 4, np.arange(size[1]) + left - 4)


def draw_interpolation(data: DataConfig, rng: np.random.Generator) -> Image.Resampling:
    if data.interpolation == "random":
        return Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC
    return Image.Resampling[data.interpolation.upper()]


def random_shift(image: Pixels, places: Places, share: float, rng: np.random.Generator) -> tuple[Pixels, Places]:
    """Moves the image by up to `share` of its sides; the edge is repeated, of which nothing is told."""
    height, width, _ = image.shape
    most = [round(share * side) for side in (height, width)]
    down, right = (rng.integers(0, 2 * pixels + 1) - pixels for pixels in most)
    rows, columns = np.arange(height) + down, np.arange(width) + right
    return image[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)], places.take(rows, columns)


# RandAugment. `level` is the strength over 10, so from 0 to 1, and `sign` 1 or -1. Source: timm's auto_augment.py, its
# "increasing" operations. What it draws as pixels to come in from outside is grey, mean * 255.


def _through_pillow(operation: Callable[[Image.Image], Image.Image]) -> Callable[..., Pixels]:
    def operate(image: Pixels, *_) -> Pixels:
        return from_pillow(operation(to_pillow(image)))

    return operate


def _look_up(image: Pixels, table: np.ndarray) -> Pixels:
    return table.astype(np.uint8).take(image)


values = np.arange(256)


def _posterize(image, level, *_):
    # At level 1 no bit is left and the image is black. timm asks Pillow for it, which refuses since version 13.
    bits = 4 - int(level * 4)
    return _look_up(image, values & (0xFF << (8 - bits)))


def _solarize(image, level, *_):
    return _look_up(image, np.where(values < 256 - int(level * 256), values, 255 - values))


def _solarize_add(image, level, *_):
    return _look_up(image, np.where(values < 128, np.minimum(255, values + int(level * 110)), values))


def _enhance(kind: type) -> Callable[..., Pixels]:
    def operate(image, level, sign, *_):
        return from_pillow(kind(to_pillow(image)).enhance(max(0.1, 1 + sign * level * 0.9)))

    return operate


def _sharpness(image, level, sign, *_):
    return from_pillow(Image.blend(to_pillow(_smooth(image)), to_pillow(image), max(0.1, 1 + sign * level * 0.9)))


def _smooth(image: Pixels) -> Pixels:
    """Pillow's ImageFilter.SMOOTH: a pixel five times and its eight neighbours, over 13. The border stays as it is."""
    total = image.astype(np.uint16)
    rows = total[:-2] + total[1:-1] + total[2:]
    inside = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * total[1:-1, 1:-1]
    smooth = image.copy()
    smooth[1:-1, 1:-1] = (2 * inside + 13) // 26  # rounded; halves do not occur
    return smooth


def _rotate(image, level, sign, interpolation, fill):
    angle = -math.radians(sign * level * 30 % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    y, x = (side / 2 for side in image.shape[:2])  # the middle stays where it is
    return affine(image, (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y), interpolation, fill)


def _shear_x(image, level, sign, interpolation, fill):
    return affine(image, (1, sign * level * 0.3, 0, 0, 1, 0), interpolation, fill)


def _shear_y(image, level, sign, interpolation, fill):
    return affine(image, (1, 0, 0, sign * level * 0.3, 1, 0), interpolation, fill)


def _translate_x(image, level, sign, interpolation, fill):
    return affine(image, (1, 0, sign * level * 0.45 * image.shape[1], 0, 1, 0), interpolation, fill)


def _translate_y(image, level, sign, interpolation, fill):
    return affine(image, (1, 0, 0, 0, 1, sign * level * 0.45 * image.shape[0]), interpolation, fill)


OPERATIONS: dict[str, Callable[..., Pixels]] = {
    "AutoContrast": _through_pillow(ImageOps.autocontrast),
    "Equalize": _through_pillow(ImageOps.equalize),
    "Invert": lambda image, *_: 255 - image,
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhance(ImageEnhance.Color),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}


GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
"""The operations that move pixels."""


def randaugment(image: Pixels, data: DataConfig, rng: np.random.Generator) -> Pixels:
    """Draws operations with replacement and applies each with probability 0.5, at a strength of its own."""
    fill = fill_of(image, data)
    coloured, still = has_colours(image), TASKS[data.task].dense
    operations = list(OPERATIONS)
    for drawn in rng.integers(len(operations), size=data.randaugment_ops):
        if rng.random() < 0.5:
            continue
        level = min(10, max(0, rng.normal(data.randaugment_magnitude, data.randaugment_std))) / 10
        sign = -1 if rng.random() < 0.5 else 1
        interpolation, name = draw_interpolation(data, rng), operations[drawn]
        if coloured if name not in GEOMETRY else not still:
            image = OPERATIONS[name](image, level, sign, interpolation, fill)
    return image


def three_augment(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Grey, solarised from 128 on, or blurred by a radius of its own. Source: timm's policy `3a`."""
    kind, radius = rng.integers(3), rng.uniform(0.1, 2.0)
    if not has_colours(image):
        return image
    if kind == 0:
        return _solarize(image, 0.5)
    picture = to_pillow(image)
    changed = (
        ImageEnhance.Color(picture).enhance(0.0) if kind == 1 else picture.filter(ImageFilter.GaussianBlur(radius))
    )
    return from_pillow(changed)


def has_colours(image: Pixels) -> bool:
    """True if operations on colours are defined: 1 or 3 channels of 8 bits."""
    return image.dtype == np.uint8 and image.shape[2] in (1, 3)


def fill_of(image: Pixels, by: Any) -> tuple[float, ...]:
    """The fill for pixels outside of an image: the `mean` of each channel."""
    mean = np.broadcast_to(by.mean, image.shape[2])
    if image.dtype.kind == "f":
        return tuple(map(float, mean))
    white = full_scale_of(image.dtype)
    return tuple(max(0, min(white, round(white * float(each)))) for each in mean)


def color_jitter(image: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Brightness, contrast and saturation in random order, each by a factor of its own.

    Source: torchvision's ColorJitter.
    """
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    picture = to_pillow(image)
    for kind in rng.permutation(len(kinds)):
        picture = kinds[kind](picture).enhance(rng.uniform(max(0, 1 - strength), 1 + strength))
    return from_pillow(picture)
