"""Augmentation by its statistics over many seeds, beside that of timm and torchvision."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import torch
from others import timm
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import CenterCrop, ColorJitter, InterpolationMode, Pad, RandomResizedCrop, Resize

from tnt_jax.config import DataConfig
from tnt_jax.data import augment, mixing
from tnt_jax.data.crop import evaluation_crop

SEEDS = 200
COLOURS = np.random.default_rng(0).integers(40, 200, (8, 8, 3)).astype(np.uint8)


def same_distribution(ours, theirs):
    return ks_2samp(ours, theirs).pvalue > 1e-3


def test_colour_jitter_changes_brightness_contrast_and_saturation_as_torchvision_does():
    def measured(picture):
        pixels = np.asarray(picture, np.float64)
        grey = pixels @ (0.299, 0.587, 0.114)
        return grey.mean(), grey.std() / grey.mean(), (pixels.max(axis=2) - pixels.min(axis=2)).mean() / grey.std()

    torch.manual_seed(0)
    theirs = [measured(ColorJitter(0.4, 0.4, 0.4)(Image.fromarray(COLOURS))) for _ in range(SEEDS)]
    data = DataConfig.plain("digits", color_jitter=0.4)
    ours = [measured(augment.augment(COLOURS, data, (8, 8), np.random.default_rng(seed))[0]) for seed in range(SEEDS)]
    for each in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert same_distribution(*each)


def test_erased_rectangles_have_the_areas_and_aspects_of_timms():
    def measured(images):
        boxes = [np.argwhere(image != 9) for image in images]
        sides = np.array([np.ptp(box, axis=0)[:2] + 1 for box in boxes])
        return np.log(sides[:, 0] / sides[:, 1]), sides.prod(axis=1)

    torch.manual_seed(0)
    erase = timm.data.random_erasing.RandomErasing(1.0, mode="pixel", device="cpu")
    theirs = measured([erase(torch.full((3, 64, 64), 9.0)).permute(1, 2, 0).numpy() for _ in range(SEEDS)])
    ours = measured(np.asarray(mixing.erase(jax.random.key(0), jnp.full((SEEDS, 64, 64, 3), 9.0), 1.0)))
    for each in zip(ours, theirs, strict=True):
        assert same_distribution(*each)
    assert np.log(3.0) < np.abs(ours[0]).max() < np.log(3.6)  # 0.3 to 3.3, in whole pixels


def test_three_augment_is_timms():
    def kinds(image):
        """Which of the three made an image, and how much is left of its contrast where it was blurred."""
        if (image.max(axis=2) == image.min(axis=2)).all():
            return "grey", 0.0
        same = image == np.where(COLOURS < 128, COLOURS, 255 - COLOURS)
        return ("solarised", 0.0) if same.all() else ("blurred", image.std() / COLOURS.std())

    random.seed(0)
    transform = timm.data.auto_augment.auto_augment_transform("3a", {})
    theirs = [kinds(np.asarray(transform(Image.fromarray(COLOURS)))) for _ in range(3 * SEEDS)]
    data = DataConfig.plain("digits", auto_augment="3a")
    ours = [kinds(augment.augment(COLOURS, data, (8, 8), np.random.default_rng(seed))[0]) for seed in range(3 * SEEDS)]
    for kind in ("grey", "solarised", "blurred"):
        counts = [sum(each == kind for each, _ in made) for made in (ours, theirs)]
        assert abs(counts[0] - counts[1]) < 4 * np.sqrt(2 * 3 * SEEDS * 2 / 9)  # four standard deviations
        assert min(counts) > SEEDS / 2
    blurs = [[left for kind, left in made if kind == "blurred"] for made in (ours, theirs)]
    assert same_distribution(*blurs)
    for name, changed in (("Desaturate", "grey"), ("Solarize", "solarised")):
        level = {"Desaturate": 10, "Solarize": 5}[name]
        picture = timm.data.auto_augment.AugmentOp(name, 1.0, level)(Image.fromarray(COLOURS))
        seed = next(seed for seed, (kind, _) in enumerate(ours) if kind == changed)
        mine = augment.augment(COLOURS, data, (8, 8), np.random.default_rng(seed))[0]
        np.testing.assert_array_equal(mine, np.asarray(picture))


def test_a_simple_crop_is_a_place_in_what_torchvision_resizes_and_pads():
    photo = np.random.default_rng(1).integers(0, 256, (33, 51, 3)).astype(np.uint8)
    whole = Pad(4, padding_mode="reflect")(Resize(16, InterpolationMode.BICUBIC)(Image.fromarray(photo)))
    places = np.lib.stride_tricks.sliding_window_view(np.asarray(whole), (16, 16, 3))[:, :, 0]
    data = DataConfig.plain("digits", simple_crop=True, interpolation="bicubic")
    seen = set()
    for seed in range(300):
        crop = augment.augment(photo, data, (16, 16), np.random.default_rng(seed))[0]
        (place,) = np.argwhere((places == crop).all(axis=(2, 3, 4))).tolist()
        seen.add(tuple(place))
    rows, columns = (np.unique(each) for each in zip(*seen, strict=True))
    assert rows.tolist() == list(range(9))
    assert columns.tolist() == list(range(places.shape[1]))


def test_random_crops_have_the_areas_and_aspects_of_torchvisions():
    torch.manual_seed(0)
    scale, ratio, image = (0.1, 0.5), (0.25, 4.0), torch.zeros(3, 400, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio)[2:] for _ in range(1000)])
    data, rng = DataConfig(crop_area=scale, crop_aspect=ratio), np.random.default_rng(0)
    ours = np.array([augment.crop_box(400, 500, data, rng)[2:] for _ in range(1000)])
    assert same_distribution(ours.prod(axis=1), theirs.prod(axis=1))
    assert same_distribution(ours[:, 1] / ours[:, 0], theirs[:, 1] / theirs[:, 0])


def test_the_crop_of_evaluation_is_torchvisions_for_images_of_any_sides():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 120, (40, 2)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        resized = Resize(36, InterpolationMode.BICUBIC)(Image.fromarray(image))
        np.testing.assert_array_equal(evaluation_crop(image, (32, 32), 0.875), CenterCrop(32)(resized))
