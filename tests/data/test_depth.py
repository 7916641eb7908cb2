"""Images of any depth and number of channels: nothing is cut, and what is white is known or asked for."""

import io
import struct

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import Image

from tnt_jax.config import InputError
from tnt_jax.data import depth
from tnt_jax.data.decode import Reading, read_image
from tnt_jax.data.samples import to_channels, to_depth

RNG = np.random.default_rng(0)


def noise(*shape, dtype=np.uint16):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_of_16_bits_keeps_them_all(channels):
    pixels = noise(23, 31, channels)
    read = read_image(imagecodecs.png_encode(pixels), channels)
    np.testing.assert_array_equal(read, pixels)
    if channels in (2, 4):  # alpha is no colour
        np.testing.assert_array_equal(read_image(imagecodecs.png_encode(pixels), 3), pixels[..., :-1])


def test_a_ppm_of_16_bits_keeps_them_all():
    pixels = noise(5, 7, 3)
    content = b"P6 # made by hand\n7 5\n65535\n" + pixels.astype(">u2").tobytes()
    np.testing.assert_array_equal(read_image(content), pixels)
    twelve = b"P6\n1 1\n4095\n" + struct.pack(">HHH", 0, 4095, 2048)
    assert read_image(twelve).tolist() == [[[0, 65535, 32776]]]
    grey = b"P5\n2 1\n65535\n" + struct.pack(">HH", 7, 65535)
    assert read_image(grey).tolist() == [[[7], [65535]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("planes", ["contig", "separate", "pages"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_every_band_of_a_tiff_is_read(dtype, channels, planes, compression):
    pixels = noise(9, 8, channels, dtype=dtype) if dtype != np.float32 else RNG.random((9, 8, channels), dtype)
    if planes == "pages":
        content = tiff(pixels.transpose(2, 0, 1), photometric="minisblack", compression=compression)
    elif planes == "separate" and channels > 1:
        content = tiff(
            pixels.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate", compression=compression
        )
    else:
        photometric = "rgb" if channels == 3 else "minisblack"
        content = tiff(
            pixels, photometric=photometric, planarconfig="contig" if channels > 1 else None, compression=compression
        )
    read = read_image(content, channels)
    np.testing.assert_array_equal(read, pixels)
    assert read.dtype == dtype


def test_a_tiff_says_what_is_white_and_which_way_is_up():
    twelve = np.arange(4096, dtype=np.uint16).reshape(32, 64, 2)
    content = tiff(twelve, photometric="minisblack", planarconfig="contig", extratags=[(281, 3, 2, (4095, 4095), True)])
    read = read_image(content)
    assert (read[0, 0, 0], read[-1, -1, -1], len(np.unique(read))) == (0, 65535, 4096)
    turned = tiff(np.rot90(twelve), photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, 6, True)])
    np.testing.assert_array_equal(read_image(turned), twelve)


def test_a_document_of_coloured_pages_is_its_first_page():
    pages = noise(3, 6, 5, 3, dtype=np.uint8)
    np.testing.assert_array_equal(read_image(tiff(pages, photometric="rgb"), 3), pages[0])


def test_an_array_in_a_file_is_an_image():
    pixels = noise(4, 5, 7)
    np.testing.assert_array_equal(read_image(npy(pixels), 7), pixels)
    with pytest.raises(InputError, match="its channels are first: transpose"):
        read_image(npy(pixels.transpose(2, 0, 1)), 7)


@pytest.mark.parametrize(
    ("samples", "white", "expected"),
    [
        (np.array([[0, 255]], np.int32), 255, [0, 255]),
        (np.array([[0, 4095]], np.uint16), 4095, [0, 65535]),
        (np.array([[0, 1]], np.int64), 1, [0, 255]),
        (np.array([[0, 2**24]], np.uint32), 2**24, [0, 1]),
        (np.array([[0.0, 0.5]], np.float64), None, [0, 0.5]),
        (np.array([[0.0, 255.0]], np.float32), 255, [0, 1]),
        (np.array([[-3.0, 700.0]], np.float32), 1, [-3, 700]),
        (np.array([[False, True]]), None, [0, 255]),
    ],
)
def test_samples_are_what_they_mean(samples, white, expected):
    for source in (samples, npy(samples)):
        assert read_image(source, reading=Reading(white)).ravel().tolist() == expected
    if samples.dtype in (np.int32, np.uint32, np.float32):
        assert read_image(tiff(samples), reading=Reading(white)).ravel().tolist() == expected


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            np.array([[0, 255]], np.int32),
            "its samples are int32 from 0 to 255, and what is white is not .*data.white",
        ),
        (np.array([[0.0, 255.0]], np.float32), "its samples are float32 from 0 to 255, and what is white is not known"),
        (np.array([[0.0, np.nan]], np.float32), "it has samples that are NaN"),
        (np.array([[-1, 5]], np.int16), "its samples reach -1: below 0 is no pixel"),
    ],
)
def test_where_white_is_not_known_it_is_asked_for(samples, message):
    for source in (samples, npy(samples), tiff(samples)):
        with pytest.raises(InputError, match=f"cannot be read as an image: {message}"):
            read_image(source)


def test_depths_become_each_other_with_the_same_white():
    deep_pixels = noise(4, 4, 3)
    small = to_depth(deep_pixels, "uint8")
    np.testing.assert_array_equal(small, np.round(deep_pixels / 257).astype(np.uint8))
    np.testing.assert_array_equal(to_depth(to_depth(small, "uint16"), "uint8"), small)
    np.testing.assert_array_equal(to_depth(to_depth(deep_pixels, "float32"), "uint16"), deep_pixels)
    with pytest.raises(InputError, match=r"model.in_channels is 4, and the image has 3 channels"):
        to_channels(small, 4)


def test_heic_is_read_by_its_plugin_or_says_what_to_install(monkeypatch):
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30))).save(file, quality=-1)
    assert np.abs(read_image(file.getvalue()).astype(int) - (200, 30, 30)).max() < 4
    monkeypatch.setitem(depth.PLUGINS, "HEIC", ("no_such_module", "pillow-heif"))
    with pytest.raises(InputError, match=r"it is HEIC, which needs pillow-heif: pip install pillow-heif"):
        read_image(file.getvalue())


def test_jpeg_xl_is_read_by_its_plugin_or_says_what_to_install(monkeypatch):
    pixels = noise(16, 24, 3, dtype=np.uint8)
    content = imagecodecs.jpegxl_encode(pixels, lossless=True)
    np.testing.assert_array_equal(read_image(content), pixels)
    monkeypatch.setitem(depth.PLUGINS, "JPEG XL", ("no_such_module", "pillow-jxl-plugin"))
    with pytest.raises(InputError, match=r"it is JPEG XL, which needs pillow-jxl-plugin"):
        read_image(content)


@pytest.mark.parametrize("size", [(16, 24), (8, 8), (2000, 4000), (300, 701), (90, 120), (1, 5)])
def test_a_jpeg_xl_that_is_too_large_is_refused_before_its_plugin_decodes_it(size, monkeypatch):
    content = imagecodecs.jpegxl_encode(np.zeros((*size, 3), np.uint8), lossless=True)
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n" + struct.pack(">I", 8 + len(content)) + b"jxlc" + content
    monkeypatch.setattr("pillow_jxl.JpegXLImagePlugin.Decoder", None)
    for each in (content, boxes):
        with pytest.raises(InputError, match=f"{size[1]} x {size[0]} pixels: could be a decompression bomb"):
            read_image(each, reading=Reading(max_pixels=size[0] * size[1] - 1))


def test_the_depth_of_a_volume_counts_before_it_is_decoded(monkeypatch):
    volume = np.zeros((40, 32, 32, 3), np.uint16)
    content = tiff(volume, volumetric=True, tile=(16, 32, 32), photometric="rgb", planarconfig="contig")
    monkeypatch.setattr(depth, "_page", None)
    with pytest.raises(InputError, match="32 x 32 pixels: could be a decompression bomb; at most 10,000"):
        read_image(content, reading=Reading(max_pixels=10_000))


@pytest.mark.parametrize("white", [1.0, 4095.0, 65535.0])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_white_is_not_said_of_files_of_8_bits(kind, white):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 200, 200)).save(file, kind)
    read = read_image(file.getvalue(), reading=Reading(white))
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - 200).max() <= 1
    bands = tiff(np.full((8, 8, 5), 200, np.uint8), photometric="minisblack", planarconfig="contig")
    assert (read_image(bands, 5, reading=Reading(white)) == 200).all()
    assert (read_image(np.full((8, 8, 3), 200, np.uint8), reading=Reading(4095.0)) == 200).all()


def test_grey_of_any_depth_is_that_of_itu_601():
    for full, dtype in ((255, np.uint8), (65535, np.uint16), (1, np.float32)):
        colours = (np.eye(3)[None] * full).astype(dtype)  # red, green, blue
        grey = to_channels(colours, 1).ravel() / full
        np.testing.assert_allclose(grey, [0.299, 0.587, 0.114], atol=0.6 / 255)


def test_the_bomb_limit_is_one_number_for_every_format():
    pixels = noise(20, 30, 5)
    for content in (tiff(pixels, photometric="minisblack", planarconfig="contig"), npy(pixels)):
        assert read_image(content, reading=Reading(max_pixels=1200)).shape == (20, 30, 5)
        with pytest.raises(InputError, match="at most 1,199 are decoded"):
            read_image(content, reading=Reading(max_pixels=1199))
