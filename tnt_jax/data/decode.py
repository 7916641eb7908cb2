"""An image to pixels: the one reader of training, evaluation and prediction."""

import contextlib
import dataclasses
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
import simplejpeg
from jaxtyping import UInt16
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data import depth
from tnt_jax.data.samples import Pixels, at_full_scale, check_size, upright

ORIENTATION = 0x0112
ORIENTATION_MARKS = (b"Exif\0\0", b"tiff:Orientation")
"""One of them is in every JPEG that says how it lies: of EXIF and of XMP. Pillow parses slowly; most say nothing."""
LARGEST_WHOLE = 100_000_000
"""Pixels. JPEGs of more are always decoded at a fraction of their size where that is large enough."""


@runtime_checkable
class SupportsArray(Protocol):
    """An array of JAX, PyTorch or another library."""

    def __array__(self) -> np.ndarray: ...


ImageSource = str | os.PathLike | bytes | bytearray | memoryview | io.IOBase | BinaryIO | Image.Image | SupportsArray
"""The file or bytes that an image is read from."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """The settings of decoding. See the fields of `DataConfig`."""

    white: float | None = None
    max_pixels: int = DataConfig.max_pixels
    fast_decode: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> "Reading":
        return cls(data.white, data.max_pixels, data.fast_decode)


AS_IT_IS = Reading()


def read_image(
    source: ImageSource,
    channels: int | None = None,
    *,
    at_least: tuple[int, int] | None = None,
    reading: Reading = AS_IT_IS,
    name: str | Callable[[], str] | None = None,
) -> Pixels:
    """The pixels of an image, upright as EXIF or XMP says: uint8, uint16 or float32 (height, width, channels).

    Grey stays grey, palettes and CMYK become RGB, and of an animation it is the first picture. Alpha is a channel only
    where as many channels are wanted; else it is dropped, which shows the colour beneath it. White is 255, 65535 or 1;
    no sample is cut to fewer bits.

    Args:
        source: path, bytes of a file, open binary file, PIL image, or array (height, width[, channels]) of NumPy, JAX
            or PyTorch.
        channels: how many the model takes. The image may have others: see `to_channels`.
        at_least: height and width. A JPEG that is twice as large, or 4 or 8 times, is decoded at that fraction of its
            size if it has more than `LARGEST_WHOLE` pixels or `reading.fast_decode` is set: much faster, but not with
            the pixels that resizing it would give.
        name: of the image, for errors; or what gives it then.

    Raises:
        InputError: there is no such file, or it cannot be read as an image; the message says which and why.
    """
    given = source
    try:
        if isinstance(source, str | os.PathLike):
            with open(os.path.expanduser(source), "rb") as file:
                source = file.read()
        elif hasattr(source, "read"):
            source = source.read()
        if isinstance(source, bytes | bytearray | memoryview):
            pixels = _decode(bytes(source), channels, at_least, reading)
        elif isinstance(source, Image.Image):
            pixels = _of_pillow(source, channels, reading)
        elif hasattr(source, "__array__"):
            array = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
            pixels = depth.of_array(array, channels, reading.white)
        else:
            raise InputError(
                f"{source!r:.80} is no image; one is a path, bytes, an open file, a PIL image, or an array "
                "(height, width, channels)"
            )
        check_size(*pixels.shape, reading.max_pixels)
        return pixels
    except InputError:
        raise
    except FileNotFoundError:
        name = _called(name, given)
        link = f": it is a link to {os.readlink(name)}, which is not there" if os.path.islink(name) else ""
        raise InputError(f"there is no image {name}{link}") from None
    except Exception as error:  # decoders raise nearly everything for a damaged file
        raise InputError(f"{_called(name, given)} cannot be read as an image: {_reason(error)}") from error


def read_mask(
    source: str | bytes, max_pixels: int = DataConfig.max_pixels, name: str = "the mask"
) -> UInt16[np.ndarray, "height width"]:
    """The values of a mask, upright: a number for each pixel, of a palette the place in it.

    Args:
        source: path, or bytes of a file, which `name` names for errors.

    Raises:
        InputError: there is no such file, or it is no mask.
    """
    name = source if isinstance(source, str) else name
    try:
        content = Path(source).read_bytes() if isinstance(source, str) else source
        if content.startswith(b"\x93NUMPY"):
            values = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            image = _open(content)
            check_size(image.height, image.width, 1, max_pixels)
            if image.format in ("JPEG", "WEBP"):
                raise ValueError(f"it is {image.format}, which changes the numbers of classes; PNG keeps them")
            image.load()
            values = upright(np.asarray(image), _orientation(image))
        if values.ndim == 3 and (values == values[..., :1]).all():  # grey that was saved as colours
            values = values[..., 0]
        if values.ndim != 2 or values.dtype.kind not in "uib":
            raise ValueError(
                f"it is {values.dtype} {values.shape}, and should have one channel with the number of a class in each "
                "pixel: grey, or a palette"
            )
        check_size(*values.shape, 1, max_pixels)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values are {values.min()} to {values.max()}, and should be 0 to 65535")
        return values.astype(np.uint16)
    except FileNotFoundError:
        raise InputError(f"there is no mask {name}") from None
    except Exception as error:  # decoders raise nearly everything for a damaged file
        raise InputError(f"{name} cannot be read as a mask: {_reason(error)}") from error


def _called(name: str | Callable[[], str] | None, source: ImageSource) -> str:
    return (name() if callable(name) else name) or name_of_image(source)


def name_of_image(source: ImageSource) -> str:
    """The name of an image in messages."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else getattr(source, "name", None)
    return str(name or "the image")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not in a format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    return next(iter(str(error).splitlines()), None) or type(error).__name__


def _decode(content: bytes, channels: int | None, at_least: tuple[int, int] | None, reading: Reading) -> Pixels:
    if not content:
        raise ValueError("it is empty")
    if content.startswith(b"\xff\xd8\xff"):
        pixels = _jpeg(content, channels, at_least, reading)
        if pixels is not None:
            return pixels
    if content.startswith(b"\x93NUMPY"):
        return depth.of_array(np.load(io.BytesIO(content), allow_pickle=False), channels, reading.white)
    if content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        pixels = depth.tiff(content, channels, reading.white, reading.max_pixels)
        if pixels is not None:
            return pixels
    if (samples := depth.pnm(content, reading.max_pixels)) is not None:
        return samples
    depth.register_plugin(content, reading.max_pixels)
    image = _open(content)
    check_size(image.height, image.width, 1, reading.max_pixels)
    if image.format == "PNG" and (samples := depth.png(image, content, channels)) is not None:
        return upright(at_full_scale(samples, reading.white), _orientation(image))
    if at_least and _small_enough(image.height * image.width, reading):
        image.draft("RGB", (max(at_least),) * 2)  # it may lie on its side
    return _of_pillow(image, channels, reading)


def _small_enough(pixels: int, reading: Reading) -> bool:
    """True if an image is decoded at a fraction of its size, if its format can do so."""
    return reading.fast_decode or pixels > LARGEST_WHOLE


def _jpeg(content: bytes, channels: int | None, at_least: tuple[int, int] | None, reading: Reading) -> Pixels | None:
    """By simplejpeg, with Pillow's pixels; None where Pillow must do it, or say what is wrong."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None  # Pillow converts CMYK in another way, and it is the reference
    check_size(height, width, 1, reading.max_pixels)
    orientation = 1
    if any(mark in content for mark in ORIENTATION_MARKS):
        with contextlib.suppress(Exception):  # damaged metadata raise nearly everything
            orientation = _orientation(_open(content))
    sizes = {}
    if at_least and _small_enough(height * width, reading):
        sizes = _scaled_down(height, width, at_least[::-1] if orientation > 4 else at_least)
    kind = "Gray" if colours == "Gray" and channels != 3 else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(content, colorspace=kind, **sizes)
    except ValueError:
        return None
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels if orientation == 1 else upright(pixels, orientation)


def _scaled_down(height: int, width: int, at_least: tuple[int, int]) -> dict[str, int]:
    """simplejpeg's arguments for the smallest of 1, 1/2, 1/4 and 1/8 of the size that is large enough."""
    factor = next((n for n in (8, 4, 2) if height >= n * at_least[0] and width >= n * at_least[1]), 1)
    return {"min_height": -(-height // factor), "min_width": -(-width // factor)}


def _orientation(image: Image.Image) -> int:
    """1 to 8. What is no orientation is 1."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata raise nearly everything
        return 1
    return orientation if orientation in range(1, 9) else 1


def _open(content: bytes) -> Image.Image:
    """As `Image.open`, without its limits: ours are checked before anything is decoded."""
    file, prefix = io.BytesIO(content), content[:16]
    for register in (Image.preinit, Image.init):
        register()
        for kind in Image.ID:
            factory, accepts = Image.OPEN[kind]
            if kind == "EPS" or (accepts and accepts(prefix) is not True and not accepts(prefix)):
                continue  # EPS is a program, which Ghostscript would run
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    raise Image.UnidentifiedImageError


def _of_pillow(image: Image.Image, channels: int | None, reading: Reading) -> Pixels:
    check_size(image.height, image.width, 1, reading.max_pixels)
    image.load()
    orientation, mode = _orientation(image), image.mode
    with_alpha = mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if mode.startswith("I;16") or mode in ("I", "F") or mode == "RGBX" or (mode == "RGBA" and channels == 4):
        samples = np.asarray(image)
    elif with_alpha and channels == 4:
        samples = np.asarray(image.convert("RGBA"))
    elif with_alpha and channels == 2 and mode in ("LA", "La", "L"):
        samples = np.asarray(image.convert("LA"))
    else:
        samples = np.asarray(image.convert("L" if mode in ("1", "L", "LA", "La") else "RGB"))
    if mode == "I" and image.format == "PPM":
        samples = samples.astype(np.uint16)  # Pillow has scaled them to 65535
    samples = samples.reshape(*samples.shape[:2], -1)
    # A file of 8 bits is white at 255, whatever `white` says of the others.
    pixels = at_full_scale(samples, None if samples.dtype == np.uint8 else reading.white)
    return pixels if orientation == 1 else upright(pixels, orientation)
