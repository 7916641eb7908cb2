"""Resizing, and affine maps: where the host spends its time. Pixel for pixel what Pillow does.

For RGB images, resample.c does it several times faster. It is compiled once, when it is first needed, with the
machine's C compiler, into `~/.cache/tnt_jax`. Where there is no compiler Pillow itself is called: the pixels are the
same.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import subprocess
import tempfile

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "height width channels"]
logger = logging.getLogger(__name__)
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
        picture = _to_pillow(image).resize(size[::-1], interpolation)
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
        picture = _to_pillow(image)
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


def _to_pillow(image: Pixels) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _checked(done: int, out: Pixels) -> Pixels:
    if not done:
        raise MemoryError("there is no memory left to resample an image")
    return out


@functools.cache
def _library() -> ctypes.CDLL | None:
    """resample.c, compiled; None where that cannot be done."""
    # Without contraction, so that sums are rounded as Pillow's are.
    flags = ["-O3", "-ffp-contract=off", "-fPIC", "-shared"]
    if platform.machine() == "x86_64" and "avx2" in _processor():
        flags.append("-mavx2")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tnt_jax"
    version = hashlib.sha256(SOURCE.read_bytes() + repr((flags, platform.machine())).encode()).hexdigest()[:16]
    path = cache / f"resample-{version}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:  # others may be compiling it at the same time
                made = pathlib.Path(folder) / path.name
                command = [os.environ.get("CC", "cc"), *flags, str(SOURCE), "-o", str(made), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                made.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("resample.c is not used, so that preparing images takes up to twice as long: %s", error)
        return None


def _processor() -> str:
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
