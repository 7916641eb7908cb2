import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_jax.config import DataConfig
from tnt_jax.data import mixing

RECIPE = DataConfig()
PLAIN = dataclasses.replace(RECIPE, mixup=0.0, cutmix=0.0, erasing=0.0, label_smoothing=0.0)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 16, 20, 3), dtype=np.uint8))
LABELS = jnp.arange(8)


@functools.cache
def compiled(data):
    return jax.jit(functools.partial(mixing.prepare_training, data=data, num_classes=10))


def prepare(data, seed=0):
    return compiled(data)(IMAGES, LABELS, key=jax.random.key(seed))


def test_nothing_but_normalising_is_left_when_all_else_is_off():
    inputs, targets = prepare(PLAIN)
    np.testing.assert_allclose(inputs, (np.asarray(IMAGES) / 255 - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_array_equal(targets, np.eye(10)[:8])


def test_smoothing_spreads_over_all_classes():
    _, targets = prepare(dataclasses.replace(PLAIN, label_smoothing=0.1))
    # timm's mixup_target: smoothing / classes off the label, 1 - smoothing more on it
    np.testing.assert_allclose(targets, np.full((8, 10), 0.01) + 0.9 * np.eye(10)[:8], atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_blends_images_and_targets_by_the_same_share(seed):
    inputs, targets = prepare(dataclasses.replace(PLAIN, mixup=0.8), seed)
    share = targets[0, 0]
    plain, _ = prepare(PLAIN)
    np.testing.assert_allclose(inputs, share * plain + (1 - share) * plain[::-1], atol=1e-5)
    np.testing.assert_allclose(targets, share * np.eye(10)[:8] + (1 - share) * np.eye(10)[:8][::-1], atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_takes_a_box_and_its_area_decides_the_target(seed):
    inputs, targets = prepare(dataclasses.replace(PLAIN, cutmix=1.0), seed)
    plain, _ = prepare(PLAIN)
    moved = np.any(np.asarray(inputs != plain), axis=-1)
    assert (moved == moved[0]).all(), "one box for the batch"
    rows, columns = np.flatnonzero(moved[0].any(1)), np.flatnonzero(moved[0].any(0))
    assert moved[0].sum() == len(rows) * len(columns) > 0
    assert (np.diff(rows) == 1).all()
    assert (np.diff(columns) == 1).all()
    np.testing.assert_array_equal(np.asarray(inputs)[moved], np.asarray(plain[::-1])[moved])
    np.testing.assert_allclose(targets[0, 0], 1 - moved[0].mean(), atol=1e-6)


def test_half_of_the_batches_are_cut_and_half_are_blended_with_the_alphas_of_the_recipe():
    draw = jax.vmap(lambda key: mixing.draw_mix(key, (64, 64), RECIPE))
    shares, boxes = draw(jax.random.split(jax.random.key(0), 4000))
    cut = np.asarray(boxes.any(axis=(1, 2)))
    assert abs(cut.mean() - 0.5) < 0.04  # a few boxes are empty
    # A beta distribution with alpha has variance 1 / (4 (2 alpha + 1))
    assert abs(np.var(np.asarray(shares)[~cut]) - 1 / (4 * 2.6)) < 0.01
    # timm's rand_bbox with its correction for what the border cuts off
    rng = np.random.default_rng(0)
    kept = []
    for share in rng.beta(1, 1, 4000):
        cut_side = int(64 * np.sqrt(1 - share))
        low, high = (np.clip(rng.integers(0, 64, 2)[:, None] + [-(cut_side // 2), cut_side // 2], 0, 64)).T
        kept.append(1 - np.prod(high - low) / 64**2)
    assert abs(np.asarray(shares)[cut].mean() - np.mean(kept)) < 0.03


def test_no_batch_is_mixed_at_probability_zero():
    inputs, targets = prepare(dataclasses.replace(PLAIN, mixup=0.8, cutmix=1.0, mix_probability=0.0))
    plain, hard = prepare(PLAIN)
    np.testing.assert_allclose(inputs, plain, atol=1e-6)
    np.testing.assert_array_equal(targets, hard)


def test_erasing_fills_one_rectangle_of_a_quarter_of_the_images_with_noise():
    white = jnp.full((400, 32, 32, 3), 9.0)
    erased = np.asarray(mixing.erase(jax.random.key(1), white, 0.25))
    hit = (erased != 9.0).all(-1)
    some = hit.any(axis=(1, 2))
    assert abs(some.mean() - 0.25) < 0.07
    areas = []
    for mask in hit[some]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)
        areas.append(mask.mean())
    # timm: area 2% to a third, height over width 0.3 to 3.3; rounding to whole pixels
    assert min(areas) > 0.015
    assert max(areas) < 0.36
    assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.03
    noise = np.unique(erased[hit])  # one image of noise serves the batch
    assert abs(noise.mean()) < 0.06  # 3,072 numbers
    assert abs(noise.std() - 1) < 0.05


def test_everything_depends_on_the_key_alone():
    first, again, other = prepare(RECIPE, 3), prepare(RECIPE, 3), prepare(RECIPE, 4)
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


def test_targets_are_probabilities():
    for seed in range(5):
        _, targets = prepare(RECIPE, seed)
        np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-5)
