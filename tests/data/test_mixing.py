import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT

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
    areas, aspects = [], []
    for mask in hit[some]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)
        areas.append(mask.mean())
        aspects.append(np.log(len(rows) / len(columns)))
    # timm: area 2% to a third, height over width 0.3 to 3.3; rounding to whole pixels
    assert min(areas) > 0.015
    assert max(areas) < 0.36
    assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.03
    assert np.abs(aspects).max() < np.log(4)
    assert abs(np.mean(aspects)) < 0.25
    assert abs(np.std(aspects) - np.log(1 / 0.3) / np.sqrt(3)) < 0.15  # the logarithm is uniform
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


@pytest.mark.parametrize("batch", [256, pytest.param(300, marks=pytest.mark.slow)])
def test_groups_of_128_are_mixed_each_with_a_draw_of_its_own_and_inside_itself(batch):
    data = dataclasses.replace(PLAIN, mixup=0.8, cutmix=1.0)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, 8, 8, 1), dtype=np.uint8))
    plain, _ = mixing.prepare_training(images, jnp.arange(batch), data=PLAIN, num_classes=batch, key=jax.random.key(1))
    inputs, targets = mixing.prepare_training(
        images, jnp.arange(batch), data=data, num_classes=batch, key=jax.random.key(1)
    )
    shares = []
    for first in range(0, batch, 128):
        rows = np.arange(first, min(first + 128, batch))
        share = float(targets[first, first])
        shares.append(share)
        expected = share * np.eye(batch)[rows] + (1 - share) * np.eye(batch)[rows[::-1]]
        np.testing.assert_allclose(targets[rows], expected, atol=1e-6)
        own, other = np.asarray(plain[rows]), np.asarray(plain[rows[::-1]])
        blended = np.allclose(inputs[rows], share * own + (1 - share) * other, atol=1e-5)
        cut = np.isclose(inputs[rows], own, atol=1e-6) | np.isclose(inputs[rows], other, atol=1e-6)
        assert blended or cut.all()
    assert len(set(shares)) == len(shares)


ON_DEVICES = """
import dataclasses, functools
import jax, jax.numpy as jnp, numpy as np
from tnt_jax.config import DataConfig
from tnt_jax.data.mixing import prepare_training
from tnt_jax.training.mesh import make_mesh, over_batch

images = np.random.default_rng(0).integers(0, 256, (1024, 8, 8, 3), dtype=np.uint8)
labels = np.arange(1024, dtype=np.int32) % 10
results = []
for count in (1, 2, 4, 8):
    sharding = over_batch(make_mesh(devices=jax.devices()[:count]))
    step = jax.jit(
        functools.partial(prepare_training, data=DataConfig(), num_classes=10), out_shardings=(sharding, sharding)
    )
    placed = [jax.device_put(x, sharding) for x in (images, labels)]
    text = step.lower(*placed, key=jax.random.key(0)).compile().as_text()
    for sends in ("collective-permute", "all-to-all", "all-gather"):
        assert sends not in text, (count, sends)
    results.append([np.asarray(x) for x in step(*placed, key=jax.random.key(0))])
for result in results[1:]:
    for found, expected in zip(result, results[0]):
        np.testing.assert_allclose(found, expected, atol=1e-6)
"""


@pytest.mark.slow
def test_up_to_eight_devices_exchange_no_pixel_and_mix_alike():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


MANY = jnp.asarray(np.random.default_rng(1).integers(0, 2, (8, 5)).astype(np.float32))
NUMBERS = jnp.asarray(np.random.default_rng(2).normal(size=(8, 2)).astype(np.float32) * 100)
TASKS = [("multi_label", MANY), ("regression", NUMBERS)]


def prepare_task(task, labels, seed=0, **changes):
    data = dataclasses.replace(PLAIN, task=task, **changes)
    return mixing.prepare_training(IMAGES, labels, data=data, num_classes=labels.shape[1], key=jax.random.key(seed))


@pytest.mark.parametrize(("task", "labels"), TASKS)
def test_labels_and_numbers_are_targets_as_they_are(task, labels):
    np.testing.assert_array_equal(prepare_task(task, labels)[1], labels)


def test_smoothing_of_labels_spreads_over_there_and_not_there_and_numbers_have_none():
    smoothed = prepare_task("multi_label", MANY, label_smoothing=0.2)[1]
    np.testing.assert_allclose(smoothed, np.where(MANY, 0.9, 0.1), atol=1e-7)
    np.testing.assert_array_equal(prepare_task("regression", NUMBERS, label_smoothing=0.2)[1], NUMBERS)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize(("task", "labels"), TASKS)
def test_labels_and_numbers_are_mixed_in_the_shares_of_the_images(task, labels, mix):
    inputs, targets = prepare_task(task, labels, seed=3, **{mix: 1.0})
    # The shares of the same draw, from what it makes of one class an image
    _, shares = mixing.prepare_training(
        IMAGES, LABELS, data=dataclasses.replace(PLAIN, **{mix: 1.0}), num_classes=8, key=jax.random.key(3)
    )
    share = float(shares[0, 0])
    assert 0.02 < share < 0.98
    np.testing.assert_allclose(targets, share * labels + (1 - share) * labels[::-1], rtol=1e-4, atol=1e-4)
    if mix == "mixup":
        plain, _ = prepare_task(task, labels)
        np.testing.assert_allclose(inputs, share * plain + (1 - share) * plain[::-1], atol=1e-5)
