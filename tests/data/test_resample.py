import numpy as np
import pytest
from PIL import Image

from tnt_jax.data import resample

FILTERS = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]
# height and width before and after; Pillow squeezes rows before columns where the height shrinks twice as much
SIZES = [
    ((375, 500), (224, 224)), ((200, 90), (224, 224)), ((350, 160), (96, 128)), ((1, 1), (24, 24)), ((1, 60), (20, 7)),
    ((60, 1), (7, 20)), ((40, 40), (40, 40)), ((33, 47), (47, 33)), ((300, 17), (31, 64)), ((17, 300), (64, 31)),
]  # fmt: skip


def noise(height, width, channels=3):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)


def pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


@pytest.fixture(params=["compiled", "without a compiler"])
def library(request, monkeypatch):
    if request.param == "compiled":
        assert resample._library(), "the tests need a C compiler"
    else:
        monkeypatch.setattr(resample, "_library", lambda: None)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_resizing_is_pillows(before, after, interpolation, channels):
    image = noise(*before, channels)
    expected = np.asarray(pillow(image).resize(after[::-1], interpolation)).reshape(*after, channels)
    np.testing.assert_array_equal(resample.resize(image, after, interpolation), expected)
    top, left, height, width = region = (after[0] // 4, after[1] // 5, after[0] // 2, after[1] // 2)
    part = expected[top : top + height, left : left + width]
    np.testing.assert_array_equal(resample.resize(image, after, interpolation, region), part)


@pytest.mark.usefixtures("library")
def test_what_lies_outside_of_the_resized_image_is_black():
    made = resample.resize(np.full((10, 10, 3), 200, np.uint8), (10, 10), FILTERS[1], (-2, -3, 14, 16))
    expected = np.zeros((14, 16, 3), np.uint8)
    expected[2:12, 3:13] = 200
    np.testing.assert_array_equal(made, expected)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("view", [np.s_[5:30, 7:40], np.s_[:, ::-1], np.s_[::-1], np.s_[::2, ::3]])
def test_parts_and_mirrored_images_are_read_where_they_lie(view):
    image = noise(50, 60)[view]
    expected = np.asarray(pillow(np.ascontiguousarray(image)).resize((20, 30), FILTERS[1]))
    np.testing.assert_array_equal(resample.resize(image, (30, 20), FILTERS[1]), expected)
    moved = resample.affine(image, (1, 0.2, 0, 0, 1, 0), FILTERS[1], (128,) * image.shape[2])
    np.testing.assert_array_equal(
        moved, resample.affine(np.ascontiguousarray(image), (1, 0.2, 0, 0, 1, 0), FILTERS[1], (128,) * image.shape[2])
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0.27, 0, 0, 1, 0), (1, 0, 0, -0.27, 1, 0), (1, 0, 20.7, 0, 1, 0), (1, 0, 0, 0, 1, -17.3),
        (0.89, 0.45, -9, -0.45, 0.89, 20), (1, 0, 0, 0, 1, 0), (3, 0, -200, 0, 0.1, 1e9),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (2, 3)])
def test_affine_maps_are_pillows(matrix, size, interpolation, channels):
    image = noise(*size, channels)
    fill = 99 if channels == 1 else (99,) * 3
    expected = pillow(image).transform(size[::-1], Image.Transform.AFFINE, matrix, interpolation, fillcolor=fill)
    made = resample.affine(image, matrix, interpolation, (99,) * channels)
    np.testing.assert_array_equal(made, np.asarray(expected).reshape(image.shape))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("channels", [1, 3])
def test_mirroring_turns_left_and_right(channels):
    image = noise(5, 7, channels)
    np.testing.assert_array_equal(resample.mirror(image), image[:, ::-1])
    np.testing.assert_array_equal(resample.mirror(image[1:4, 2:5]), image[1:4, 4:1:-1])
