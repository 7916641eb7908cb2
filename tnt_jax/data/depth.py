"""Images of more than 8 bits, or of other channels than colour has: what Pillow cuts to 8 bits, or cannot read."""

import io
import math

import numpy as np
from PIL import Image

from tnt_jax.config import InputError
from tnt_jax.data.samples import Pixels, at_full_scale, check_size, upright

PLUGINS = {  # what an image begins with: the module that makes Pillow read it, and its package
    "HEIC": ("pillow_heif", "pillow-heif"),
    "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin"),
}
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def of_array(array: np.ndarray, channels: int | None, white: float | None) -> Pixels:
    """An array (height, width) or (height, width, channels) of samples as pixels.

    Raises:
        InputError: it has another shape.
        ValueError: what is white in it is not known.
    """
    wanted = {channels} | ({1, 3, 4} if channels in (1, 3) else set()) if channels else set(range(1, 1025))
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in wanted) or array.dtype.kind not in "buif":
        first = array.ndim == 3 and array.shape[0] in wanted
        many = "any number of" if not channels else " or ".join(map(str, sorted(wanted)))
        raise InputError(
            f"an image of shape {array.shape} and dtype {array.dtype} was given, and should be numbers "
            f"(height, width) or (height, width, channels) with {many} channels"
            + ("; its channels are first: transpose them, as in image.transpose(1, 2, 0)" if first else "")
        )
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] == 4 and channels in (1, 3):
        array = array[..., :3]  # alpha
    return np.ascontiguousarray(at_full_scale(array, white))


def register_plugin(content: bytes, most: int) -> None:
    """Makes Pillow read HEIC and JPEG XL. Raises ValueError, with what to install, where it cannot."""
    import importlib

    kind = None
    if content[4:8] == b"ftyp" and content[8:12] in HEIC_BRANDS and b"avif" not in content[8:64]:
        kind = "HEIC"
    elif content.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        kind = "JPEG XL"
    if kind is None:
        return
    module, package = PLUGINS[kind]
    try:
        plugin = importlib.import_module(module)
    except ImportError:
        raise ValueError(f"it is {kind}, which needs {package}: pip install {package}") from None
    if kind == "HEIC":
        plugin.register_heif_opener()
    else:  # its plugin decodes whatever it opens
        check_size(*_size_of_jpeg_xl(content), 1, most)


def _size_of_jpeg_xl(content: bytes) -> tuple[int, int]:
    """Height and width. Source: ISO/IEC 18181-1, SizeHeader, and 18181-2 for the boxes around it."""
    start = 0
    if not content.startswith(b"\xff\x0a"):
        whole, part = content.find(b"jxlc"), content.find(b"jxlp")
        start = whole + 4 if whole >= 0 else part + 8  # the first part is numbered
    bits = int.from_bytes(content[start + 2 : start + 14], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = side(), take(3)
    wide, high = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height, side() if ratio == 0 else height * wide // high


def png(image: Image.Image, content: bytes, channels: int | None) -> np.ndarray | None:
    """The samples of a PNG of 16 bits in colour or with alpha; None for any other.

    Pillow keeps the high bytes of these alone. It is asked twice, the second time for the low bytes.
    """
    tiles = image.tile
    raw = tiles[0].args if tiles else None
    raw = raw if isinstance(raw, str) else (raw[0] if raw else "")
    if raw not in ("RGB;16B", "RGBA;16B", "LA;16B"):
        return None
    if raw == "LA;16B":  # four bytes a pixel, as those of RGBA
        image._mode = "RGBA"
        _ask_for(image, "RGBA")
        image.load()
        whole = np.asarray(image).copy().view(">u2").astype(np.uint16)
    else:
        image.load()
        high = np.asarray(image).astype(np.uint16)
        again = type(image)(io.BytesIO(content), "")
        _ask_for(again, raw.replace("16B", "16L"))
        again.load()
        whole = high << 8 | np.asarray(again)
    alpha = whole.shape[2] in (2, 4)
    return whole[..., :-1] if alpha and channels != whole.shape[2] else whole


def _ask_for(image: Image.Image, raw: str) -> None:
    """Sets what of each sample Pillow keeps."""
    (tile,) = image.tile
    image.tile = [tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))]


def pnm(content: bytes, most: int) -> Pixels | None:
    """A PPM of more than 8 bits in colour, which Pillow would cut; None for anything else."""
    if not content.startswith(b"P6"):
        return None
    fields, at = [], 2
    while len(fields) < 3:
        while content[at : at + 1].isspace() or content[at : at + 1] == b"#":
            at = content.index(b"\n", at) + 1 if content[at : at + 1] == b"#" else at + 1
        end = at
        while content[end : end + 1].isdigit():
            end += 1
        fields.append(int(content[at:end]))
        at = end
    width, height, white = fields
    if white <= 255:
        return None
    check_size(height, width, 3, most)
    samples = np.frombuffer(content, ">u2", 3 * width * height, at + 1).reshape(height, width, 3)
    return at_full_scale(samples.astype(np.uint16), white)


def tiff(content: bytes, channels: int | None, white: float | None, most: int) -> Pixels | None:
    """A TIFF of more than 8 bits in colour, of floats, of many bands or of many pages; None where Pillow reads it.

    The channels are the bands of all pages of one size and type; of pages in colour it is the first alone.
    """
    import tifffile

    try:
        file = tifffile.TiffFile(io.BytesIO(content))
        first = file.pages.first
    except Exception:
        return None  # Pillow says what is wrong
    with file:
        colour = first.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
        plain = first.photometric in (
            tifffile.PHOTOMETRIC.RGB,
            tifffile.PHOTOMETRIC.MINISBLACK,
            tifffile.PHOTOMETRIC.MINISWHITE,
        )
        alpha = bool(first.extrasamples) and first.extrasamples[-1] in (1, 2)
        pages = [first]
        if not colour:
            same = (first.shape, first.dtype)
            pages = [page for page in file.pages if not page.is_reduced and (page.shape, page.dtype) == same]
        bands = first.samplesperpixel
        as_pillow = len(pages) == 1 and (
            (first.bitspersample <= 8 and (bands == 1 or (colour and bands == 3) or (bands in (2, 4) and alpha)))
            or (first.bitspersample == 16 and bands == 1 and first.dtype is not None and first.dtype.kind == "u")
        )
        if as_pillow or not plain:
            return None
        height, width = first.imagelength, first.imagewidth
        # By the shape, which knows of a depth too: it is what would be decoded.
        check_size(height, width, math.prod(first.shape) // max(1, height * width) * len(pages), most)
        samples = np.concatenate([_page(page) for page in pages], axis=2)
        orientation = first.tags.get(274)
        reach = _white_of(first) if samples.dtype == np.uint8 else white or _white_of(first)
    if first.photometric == tifffile.PHOTOMETRIC.MINISWHITE and samples.dtype.kind == "u":
        samples = np.iinfo(samples.dtype).max - samples
    if alpha and channels != samples.shape[2]:
        samples = samples[..., :-1]
    pixels = at_full_scale(samples, reach)
    return pixels if orientation is None else upright(pixels, int(orientation.value))


def _page(page) -> np.ndarray:
    """Samples of a page, (height, width, bands)."""
    try:
        samples = page.asarray()
    except Exception as error:
        if "imagecodecs" in str(error):
            raise ValueError(
                f"it is compressed with {page.compression.name}, which needs imagecodecs: pip install imagecodecs"
            ) from None
        raise
    order = [page.axes.index(axis) for axis in "YXS" if axis in page.axes]
    if len(order) != samples.ndim:
        raise ValueError(f"its axes are {page.axes}, and should be height, width and bands")
    samples = samples.transpose(order)
    return samples.reshape(*samples.shape[:2], math.prod(samples.shape[2:]))


def _white_of(page) -> float | None:
    """The white of the file: MaxSampleValue, of all bands."""
    tag = page.tags.get(281)
    if tag is None or page.dtype is None or page.dtype.kind != "u":
        return None
    values = np.atleast_1d(tag.value)
    return float(values[0]) if (values == values[0]).all() and values[0] > 0 else None
