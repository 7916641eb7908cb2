import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from tnt_jax.config import DataConfig
from tnt_jax.data import augment

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "timm_randaugment_ops.npz")
RECORDED = [name for name in GOLDEN.files if name not in ("image", "manifest")]
BICUBIC = Image.Resampling.BICUBIC


def photo(height=40, width=60, channels=3, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels))
    return noise.astype(np.uint8)


def test_every_operation_of_the_record_is_ours():
    assert list(augment.OPERATIONS) == json.loads(str(GOLDEN["manifest"]))["transforms"]
    # 15 operations at 5 magnitudes and 2 signs, less the two in which timm fails
    assert len(RECORDED) == 15 * 5 * 2 - 2


@pytest.mark.parametrize("case", RECORDED)
def test_randaugment_operation_equals_timms(case):
    name, magnitude, sign = case.split("|")
    ours = augment.OPERATIONS[name](GOLDEN["image"], float(magnitude) / 10, float(f"{sign}1"), BICUBIC, (128,) * 3)
    np.testing.assert_array_equal(ours, GOLDEN[case])


def test_posterize_to_no_bits_is_black():
    assert not augment.OPERATIONS["PosterizeIncreasing"](GOLDEN["image"], 1.0, 1, BICUBIC, (128,) * 3).any()


def test_crops_have_the_area_and_the_aspect_of_the_recipe_and_lie_inside():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.crop_box(375, 500, DataConfig(), rng) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
    area, aspect = height * width / (375 * 500), width / height
    assert 0.078 < area.min() < 0.1
    assert area.max() > 0.9
    assert 0.74 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 1.345


@pytest.mark.parametrize(
    ("height", "width", "box"),
    # timm's fallback: the largest allowed aspect in the middle
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))],
)
def test_a_crop_that_never_fits_falls_back_to_the_middle(height, width, box):
    whole = dataclasses.replace(DataConfig(), crop_area=(1.0, 1.0))
    assert augment.crop_box(height, width, whole, np.random.default_rng(0)) == box


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (2, 2)])
def test_images_of_a_few_pixels_are_augmented(height, width):
    for seed in range(20):
        made, _ = augment.augment(photo(height, width), DataConfig(), (32, 48), np.random.default_rng(seed))
        assert (made.shape, made.dtype) == ((32, 48, 3), np.uint8)


def test_the_same_generator_gives_the_same_image_and_another_gives_another():
    made = [augment.augment(photo(), DataConfig(), (32, 32), np.random.default_rng(seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_randaugment_applies_each_operation_equally_often_half_of_the_time(monkeypatch):
    calls = []
    for name in augment.OPERATIONS:
        monkeypatch.setitem(
            augment.OPERATIONS, name, lambda image, *args, name=name: calls.append((name, *args)) or image
        )
    rng = np.random.default_rng(0)
    for _ in range(3000):
        augment.randaugment(photo(4, 4), DataConfig(), rng)
    assert abs(len(calls) / 3000 - 1) < 0.05  # two operations, each with probability 0.5
    names, levels, signs, interpolations, fills = zip(*calls, strict=True)
    counts = [names.count(name) for name in augment.OPERATIONS]
    assert min(counts) > 150
    assert max(counts) < 250
    assert abs(np.mean(levels) - 0.9) < 0.005
    assert max(levels) <= 1
    # magnitudes above 10 are cut to 10, which takes about a tenth off the spread of 0.5
    assert 0.04 < np.std(levels) < 0.05
    assert abs(np.mean(signs)) < 0.05
    assert abs(interpolations.count(BICUBIC) / len(calls) - 0.5) < 0.03
    assert set(fills) == {(128,) * 3}


def test_colour_jitter_acts_only_where_randaugment_is_off(monkeypatch):
    plain = dataclasses.replace(DataConfig(), crop_area=None, random_flip=0.0)
    off = dataclasses.replace(plain, randaugment_ops=0)
    image = photo()
    monkeypatch.setattr(augment, "randaugment", lambda image, *_: image)
    np.testing.assert_array_equal(augment.augment(image, plain, (40, 60), np.random.default_rng(0))[0], image)
    assert not np.array_equal(augment.augment(image, off, (40, 60), np.random.default_rng(0))[0], image)


def test_grey_images_pass_through_the_whole_recipe():
    for seed in range(40):
        made, _ = augment.augment(photo(channels=1), DataConfig(), (24, 24), np.random.default_rng(seed))
        assert made.shape == (24, 24, 1)


def test_half_of_the_images_are_mirrored_and_shifts_go_to_all_sides():
    marked = np.zeros((20, 20, 1), np.uint8)
    marked[10, 9] = 255  # beside the middle, so that a mirrored mark lies in column 10
    flips = dataclasses.replace(DataConfig.plain("digits"), random_flip=0.5)
    shifts = dataclasses.replace(DataConfig.plain("digits"), random_shift=0.2)

    def marks(data):
        made = [augment.augment(marked, data, (20, 20), np.random.default_rng(seed))[0] for seed in range(200)]
        return np.array([np.argwhere(each[..., 0])[0] for each in made])

    rows, columns = marks(flips).T
    assert set(rows) == {10}
    assert set(columns) == {9, 10}
    assert 70 < (columns == 10).sum() < 130
    for moved in (marks(shifts) - (10, 9)).T:
        assert set(moved) == set(range(-4, 5))
        assert abs(moved.mean()) < 1
