"""What is told of pixels moves with them, whatever moves the image."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tnt_jax.config import DataConfig, InputError, TrainConfig, check
from tnt_jax.data.augment import augment, move
from tnt_jax.data.moving import Places, fitted

OUTSIDE = 99
WAYS = {
    "crop": {"crop_area": (0.2, 0.8)},
    "jitter": {"scale_jitter": (0.3, 2.0)},
    "whole": {},
    "shift": {"random_shift": 0.4},
    "flip": {"random_flip": 1.0},
    "crop, shift and flip": {"crop_area": (0.3, 1.0), "random_shift": 0.3, "random_flip": 0.5},
    "jitter, shift and flip": {"scale_jitter": (0.1, 2.0), "random_shift": 0.3, "random_flip": 0.5},
}


def places_as_pixels(height=50, width=70):
    """An image that says of each of its pixels where it lies, in float32: rows, columns, and 1 for not padding."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.stack([rows, columns, np.ones_like(rows)], axis=2).astype(np.float32)


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_the_places_are_those_that_the_image_itself_shows(ways):
    """Where it is not padding or the repeated edge, and to what resizing blurs at the border of the image."""
    data, image = (
        DataConfig.plain("", task="segmentation", mean=0.0, interpolation="bilinear", **ways),
        places_as_pixels(),
    )
    seen = 0
    for seed in range(20):
        pixels, places = move(image, data, (32, 48), np.random.default_rng(seed))
        assert pixels.shape == (32, 48, 3)
        shown = ~np.isnan(places.rows)[:, None] & ~np.isnan(places.columns)
        wanted = np.stack(np.broadcast_arrays(places.rows[:, None], places.columns), axis=2)
        scale = max(np.nanmax(abs(np.diff(each)), initial=1) for each in (places.rows, places.columns))
        inside = shown & (wanted > 2 * scale).all(2) & (wanted < np.array([50, 70]) - 2 * scale).all(2)
        np.testing.assert_allclose(pixels[..., :2][inside], wanted[inside], atol=0.3 + 0.05 * scale)
        if "random_shift" not in ways:
            np.testing.assert_array_equal(pixels[..., 2] > 0, shown)
        seen += inside.sum()
    assert seen > 20 * 100


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_a_box_could_move_too(ways):
    """Rows and columns are equally far apart: where a place of the whole image goes to follows from two of them."""
    data = DataConfig.plain("", task="segmentation", **ways)
    _, places = move(places_as_pixels(), data, (32, 48), np.random.default_rng(1))
    for each in (places.rows, places.columns):
        steps = np.diff(each[~np.isnan(each)])
        np.testing.assert_allclose(steps, steps[:1].repeat(len(steps)))


@pytest.mark.parametrize("size", [(20, 31), (100, 155), (64, 64), (7, 200)])
def test_a_mask_is_resized_as_pillow_does_to_the_nearest(size):
    mask = np.random.default_rng(0).integers(0, 300, (50, 70)).astype(np.uint16)
    wanted = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(Places.of_box((0, 0, 50, 70), size).of_mask(mask, OUTSIDE), wanted)


def test_what_is_fitted_is_whole_and_padding_is_outside():
    mask = np.arange(6, dtype=np.uint16).reshape(2, 3)
    image = np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40, 3, 2)
    pixels, places = fitted(image, (6, 6), Image.Resampling.BILINEAR, (7, 8, 9))
    moved = places.of_mask(mask, OUTSIDE)
    np.testing.assert_array_equal(moved[1:5], mask.repeat(2, 0).repeat(2, 1))
    assert (moved[[0, 5]] == OUTSIDE).all()
    assert (pixels[[0, 5]] == [7, 8, 9]).all()
    pixels, places = fitted(image, (2, 2), Image.Resampling.BILINEAR, (7, 8, 9), factor=3, at=(1.0, 0.0))
    np.testing.assert_array_equal(places.of_mask(mask, OUTSIDE), [[3, 3], [3, 3]])


def test_randaugment_moves_no_pixel_of_a_dense_task():
    """Its colours change; of another task the same draws move pixels."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:24] = 200
    moved = {}
    for task in ("segmentation", "single_label"):
        data = DataConfig.plain("", task=task, randaugment_ops=2, randaugment_magnitude=9.0)
        made = [augment(image, data, (32, 32), np.random.default_rng(seed))[0] for seed in range(40)]
        edges = [np.ptp(each[9:23, 9:23].astype(int), axis=(0, 1)).max() for each in made]
        moved[task] = sum(edge > 0 for edge in edges)
        changed = sum(not np.array_equal(each, image) for each in made)
        assert changed > 10
    assert moved["segmentation"] == 0 < moved["single_label"]


def test_a_jitter_instead_of_a_crop():
    plain = DataConfig.plain("digits")
    for jitter, message in (((0.5, 2.0), "instead of which data.crop_area must be None"), ((2.0, 0.5), "must rise")):
        crop = {"crop_area": (0.1, 1.0)} if jitter[0] < 1 else {}
        with pytest.raises(InputError, match=message):
            check(TrainConfig(data=dataclasses.replace(plain, scale_jitter=jitter, **crop)))
