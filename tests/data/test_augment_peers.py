"""Augmentation by its statistics over many seeds, beside that of timm and torchvision."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from others import timm
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import ColorJitter

from tnt_jax.config import DataConfig
from tnt_jax.data import augment, mixing

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
