import io
import os

import numpy as np
import published
import pytest
from PIL import Image

from tnt_jax.config import InputError
from tnt_jax.data.images import evaluation_crop, images_below, open_image

CROPS, MANIFEST = published.record("timm_evaluation_crop")


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


@pytest.mark.parametrize("case", range(len(MANIFEST["cases"])))
def test_evaluation_crop_is_timms_pixel_for_pixel(case):
    size, crop = MANIFEST["cases"][case]["size"], MANIFEST["cases"][case]["crop"]
    result = evaluation_crop(Image.fromarray(CROPS[f"image{case:02}"]), tuple(size), crop)
    np.testing.assert_array_equal(result, CROPS[f"result{case:02}"])


def test_a_grey_image_keeps_one_channel():
    image = open_image(np.arange(64, dtype=np.uint8).reshape(8, 8), channels=1)
    result = evaluation_crop(image, (8, 8), 1.0)
    np.testing.assert_array_equal(result[..., 0], np.arange(64).reshape(8, 8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_read_as_pil_converts_it(mode, picture):
    image = picture.convert(mode)
    np.testing.assert_array_equal(open_image(image), image.convert("RGB"))
    assert open_image(image, channels=1).mode == "L"


def test_alpha_is_left_away(picture):
    transparent = picture.copy()
    transparent.putalpha(0)
    np.testing.assert_array_equal(open_image(encoded(transparent)), picture)


def test_a_cmyk_jpeg_has_its_colours(picture):
    pixels = np.asarray(open_image(encoded(picture.convert("CMYK"), "JPEG", quality=95)), int)
    assert np.abs(pixels[1, 1] - (255, 0, 0)).max() < 10
    assert np.abs(pixels[6, 6] - (255, 255, 255)).max() < 10


def test_sixteen_bits_become_eight():
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024 + 17
    pixels = np.asarray(open_image(encoded(Image.fromarray(deep))))
    np.testing.assert_array_equal(pixels, np.repeat(deep[..., None] // 256, 3, axis=-1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, picture):
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]}
    undo |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1)}
    undo |= {8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](np.asarray(picture))))
    np.testing.assert_array_equal(open_image(encoded(stored, exif=exif)), picture)


def test_a_path_an_open_file_and_bytes_are_read_alike(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        np.testing.assert_array_equal(open_image(source), picture)
    with (tmp_path / "a.png").open("rb") as file:
        np.testing.assert_array_equal(open_image(file), picture)


def test_an_unreadable_image_is_named_with_the_reason(tmp_path, picture, monkeypatch):
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
            open_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"bomb\.png cannot be read as an image: .*decompression bomb"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8)])
def test_an_array_must_be_pixels(array):
    with pytest.raises(InputError, match="should be uint8"):
        open_image(array)


def test_a_folder_is_listed_deeply_and_in_natural_order(tmp_path):
    for name in ("b10.jpg", "b2.JPG", "a/c.png", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(path, tmp_path) for path in images_below(tmp_path)] == ["a/c.png", "b2.JPG", "b10.jpg"]
    first = next(images_below(tmp_path))
    (tmp_path / "b1.jpg").touch()
    assert next(images_below(tmp_path)) == first == str(tmp_path / "a/c.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"there is no image in .*none"):
        list(images_below(tmp_path / "none"))
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        list(images_below(tmp_path / "nowhere"))


def test_links_that_lead_back_are_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").touch()
    (tmp_path / "a/back").symlink_to("..")
    (tmp_path / "a/here").symlink_to(".")
    (tmp_path / "again").symlink_to("a")
    assert [os.path.relpath(path, tmp_path) for path in images_below(tmp_path)] == ["a/1.jpg"]
