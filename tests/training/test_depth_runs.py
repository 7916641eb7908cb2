"""Runs on images that 8 bits and three channels cannot hold."""

import dataclasses

import numpy as np
import pytest
from small_runs import metrics_of, tiny_run

import tnt_jax
from tnt_jax.config import DataConfig, OptimizerConfig
from tnt_jax.data.statistics import measure
from tnt_jax.training.loop import train

COUNTS = {"train": 1024, "test": 200}
CLASSES = 4
EPOCHS = 12


def patterns(count, rng):
    """Numbers of classes, and 16 x 16 pixels from 0 to 1: stripes across or down, a chessboard, or nothing."""
    labels = rng.integers(0, CLASSES, count)
    across = np.arange(16) // 2 % 2 * np.ones((16, 1))
    kinds = np.stack([across, across.T, across != across.T, np.full((16, 16), 0.5)])
    shifts = rng.integers(0, 4, (count, 2))
    drawn = [np.roll(kinds[label], shift, (0, 1)) for label, shift in zip(labels, shifts, strict=True)]
    return labels, 0.3 * rng.random((count, 16, 16)) + 0.7 * np.array(drawn)


def written(folder, images_of):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in COUNTS.items():
        labels, pixels = patterns(count, rng)
        np.save(folder / f"{split}_images.npy", images_of(pixels, rng))
        np.save(folder / f"{split}_labels.npy", labels)
    return DataConfig.plain(f"npy:{folder}")


def accuracy(data, run_dir, channels):
    """Of the averaged weights, after twelve epochs with the measured mean and deviation of each channel."""
    found = measure(data)
    config = tiny_run(run_dir, batch_size=32, epochs=EPOCHS, eval_every_epochs=EPOCHS)
    sizes = {"word_stride": 2, "depth": 2, "inner_dim": 6, "outer_dim": 64, "drop_path_rate": 0.0}
    train(
        dataclasses.replace(
            config,
            data=dataclasses.replace(data, mean=found.mean, std=found.std),
            model=dataclasses.replace(config.model, in_channels=channels, **sizes),
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_epochs=2, ema_decay=0.99),
        )
    )
    return [line for line in metrics_of(run_dir) if line["kind"] == "test"][-1]["ema_top1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.nightly
def test_of_five_bands_the_fifth_tells_the_class(tmp_path):
    def bands(pixels, rng):
        noise = rng.uniform(0, 1, (*pixels.shape, 4))
        return (255 * np.concatenate([noise, pixels[..., None]], axis=-1)).astype(np.uint8)

    assert accuracy(written(tmp_path / "five", bands), tmp_path / "run", 5) >= 0.95
    image = np.load(tmp_path / "five/test_images.npy")[0]
    label = int(np.load(tmp_path / "five/test_labels.npy")[0])
    assert tnt_jax.inference_model(tmp_path / "run", image)["pred_label"] == label
    four = written(tmp_path / "four", lambda pixels, rng: bands(pixels, rng)[..., :4])
    assert accuracy(four, tmp_path / "other", 4) < 0.4  # chance is 0.25


@pytest.mark.nightly
def test_the_class_is_in_the_low_byte_of_16_bits(tmp_path):
    def low_bytes(pixels, rng):
        return (100 << 8 | (255 * pixels).astype(np.uint16))[..., None].astype(np.uint16)

    assert accuracy(written(tmp_path / "deep", low_bytes), tmp_path / "run", 1) >= 0.95
    high = written(tmp_path / "cut", lambda pixels, rng: (low_bytes(pixels, rng) >> 8).astype(np.uint8))
    assert accuracy(high, tmp_path / "other", 1) < 0.4  # chance is 0.25
