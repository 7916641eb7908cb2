"""The meaning of samples: their white, their depth, their channels, and which way is up."""

import math

import numpy as np
from jaxtyping import Float, Num, UInt8, UInt16

from tnt_jax.config import InputError

Pixels = (
    UInt8[np.ndarray, "_height _width _channels"]
    | UInt16[np.ndarray, "_height _width _channels"]
    | Float[np.ndarray, "_height _width _channels"]
)
"""White is 255, 65535 or 1."""
AnySamples = Num[np.ndarray, "..."] | np.ndarray
DTYPES = ("uint8", "uint16", "float32")
GREY = np.array((0.299, 0.587, 0.114))  # ITU-R 601


def at_full_scale(samples: AnySamples, white: float | None) -> np.ndarray:
    """Samples of any type as uint8, uint16 or float32 whose white is 255, 65535 or 1. Nothing is lost.

    Args:
        white: the sample that is white. None: 255 for uint8, 65535 for uint16, 1 for floats between 0 and 1. More than
            255 says nothing of uint8.

    Raises:
        ValueError: what is white is not known, or there are samples that are no numbers.
    """
    kind = samples.dtype.kind
    if kind == "b":
        return samples.astype(np.uint8) * 255
    if kind == "f":
        return _floats(samples, white)
    if kind not in "ui":
        raise ValueError(f"its samples are {samples.dtype}, and should be numbers")
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    if samples.dtype in (np.uint8, np.uint16) and white in (None, np.iinfo(samples.dtype).max):
        return samples
    if samples.dtype == np.uint8 and white > 255:  # what no sample of 8 bits can be is said of other images
        return samples
    if kind == "i" and samples.size and samples.min() < 0:
        raise ValueError(f"its samples reach {samples.min()}: below 0 is no pixel")
    if white is None:
        raise ValueError(
            f"its samples are {samples.dtype} from {samples.min()} to {samples.max()}, and what is white is not known: "
            "say it with data.white, such as 255, 4095 or 65535"
        )
    if white > 65535:
        return (samples / white).astype(np.float32)
    dtype = np.uint8 if white <= 255 else np.uint16
    most = np.iinfo(dtype).max
    return np.clip(np.round(samples * (most / white)), 0, most).astype(dtype)


def _floats(samples: np.ndarray, white: float | None) -> np.ndarray:
    if not np.isfinite(samples).all():
        raise ValueError("it has samples that are NaN or infinite")
    if white is None and samples.size and not 0 <= samples.min() <= samples.max() <= 1:
        raise ValueError(
            f"its samples are {samples.dtype} from {samples.min():g} to {samples.max():g}, and what is white is not "
            "known: say it with data.white, such as 255; 1 takes them as they are"
        )
    scaled = samples if white in (None, 1) else samples / white
    return scaled.astype(np.float32, copy=False)


def full_scale_of(dtype: np.dtype) -> int:
    """The sample that is white in pixels of this type."""
    return int(np.iinfo(dtype).max) if np.dtype(dtype).kind == "u" else 1


def to_depth(pixels: Pixels, dtype: str) -> Pixels:
    """The same picture in another type, rounded; white stays white."""
    if pixels.dtype == dtype:
        return pixels
    before, after = full_scale_of(pixels.dtype), full_scale_of(np.dtype(dtype))
    scaled = pixels.astype(np.float32) * np.float32(after / before)
    return scaled if dtype == "float32" else np.clip(np.round(scaled), 0, after).astype(dtype)


def to_channels(pixels: Pixels, channels: int) -> Pixels:
    """Colour to grey (ITU-R 601), or grey to colour.

    Raises:
        InputError: there is no such way.
    """
    there = pixels.shape[2]
    if there == channels:
        return pixels
    if (there, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (there, channels) == (3, 1):
        if pixels.dtype == np.uint8:
            # Pillow's own integers, so that training, evaluation and prediction give the same grey.
            weights = np.array((19595, 38470, 7471), np.uint32)
            return ((pixels @ weights + 0x8000) >> 16).astype(np.uint8)[..., None]
        grey = pixels @ GREY
        grey = np.round(grey) if pixels.dtype.kind == "u" else grey
        return grey.astype(pixels.dtype)[..., None]
    raise InputError(
        f"model.in_channels is {channels}, and the image has {there} channel{'s' if there > 1 else ''}; only 1 and 3 "
        "are made of each other"
    )


def visible(pixels: Pixels) -> UInt8[np.ndarray, "_height _width 3"]:
    """An image that people can be shown: 8 bits RGB, of more channels the first three, of two their mean.

    Other types are stretched between their 1st and 99th percentile.
    """
    if pixels.dtype != np.uint8:
        low, high = np.percentile(pixels, (1, 99))
        scaled = (pixels.astype(np.float32) - low) * (255 / max(high - low, 1e-12))
        pixels = np.clip(np.round(scaled), 0, 255).astype(np.uint8)
    if pixels.shape[2] == 2:
        pixels = pixels.mean(axis=2, keepdims=True).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turned and mirrored as EXIF's orientation, 1 to 8, says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def check_size(height: int, width: int, channels: int, most: int) -> None:
    """Raises ValueError for an image without pixels, or with too many; every four channels count anew."""
    if not height or not width or not channels:
        raise ValueError(f"it has no pixels: {width} x {height}")
    if height * width * math.ceil(channels / 4) > most:
        raise ValueError(
            f"{width} x {height} pixels: could be a decompression bomb; at most {most:,} are decoded "
            "(data.max_pixels, --max-pixels)"
        )
