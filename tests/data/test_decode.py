import io

import numpy as np
import pytest
from PIL import Image

from tnt_jax.config import InputError
from tnt_jax.data.decode import Reading, read_image
from tnt_jax.data.samples import to_channels


def encoded(image, suffix="PNG", **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


@pytest.fixture
def picture():
    """Four quarters: red, green, blue, white."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4, 0] = pixels[:4, 4:, 1] = pixels[4:, :4, 2] = 255
    pixels[4:, 4:] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_read_as_pil_converts_it(mode, picture):
    image = picture.convert(mode)
    np.testing.assert_array_equal(to_channels(read_image(image), 3), image.convert("RGB"))
    grey = to_channels(read_image(image), 1)[..., 0]
    np.testing.assert_array_equal(grey, image.convert("RGB").convert("L"))


def test_alpha_is_left_away(picture):
    transparent = picture.copy()
    transparent.putalpha(0)
    np.testing.assert_array_equal(read_image(encoded(transparent)), picture)


def test_a_cmyk_jpeg_has_its_colours(picture):
    pixels = np.asarray(read_image(encoded(picture.convert("CMYK"), "JPEG", quality=95)), int)
    assert np.abs(pixels[1, 1] - (255, 0, 0)).max() < 10
    assert np.abs(pixels[6, 6] - (255, 255, 255)).max() < 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, picture):
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]}
    undo |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1)}
    undo |= {8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](np.asarray(picture))))
    np.testing.assert_array_equal(read_image(encoded(stored, exif=exif)), picture)


def test_a_path_an_open_file_and_bytes_are_read_alike(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        np.testing.assert_array_equal(read_image(source), picture)
    with (tmp_path / "a.png").open("rb") as file:
        np.testing.assert_array_equal(read_image(file), picture)


def test_an_unreadable_image_is_named_with_the_reason(tmp_path, picture):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(encoded(picture.resize((99, 99)))[:200])
    picture.save(tmp_path / "bomb.png")
    for name, message in {
        "none.jpg": r"there is no image .*none\.jpg",
        "empty.jpg": r"empty\.jpg cannot be read as an image: it is empty",
        "text.jpg": r"text\.jpg cannot be read as an image: it is not in a format that Pillow knows",
        "cut.png": r"cut\.png cannot be read as an image: .*truncated",
    }.items():
        with pytest.raises(InputError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match=r"bomb\.png cannot be read as an image: .*decompression bomb; at most 10 are"):
        read_image(tmp_path / "bomb.png", reading=Reading(max_pixels=10))


@pytest.mark.parametrize("array", [np.zeros((3, 5, 6), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4)])
def test_an_array_must_be_pixels(array):
    with pytest.raises(InputError, match="should be numbers"):
        read_image(array, 3)
