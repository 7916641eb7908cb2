"""Mean and standard deviation of the training images."""

import numpy as np

from tnt_jax.config import DataConfig
from tnt_jax.data.statistics import measure


def test_mean_and_deviation_are_those_of_all_pixels_as_they_are_now(tmp_path):
    rng = np.random.default_rng(0)
    for most in (256, 64):  # the second time other images lie under the same names
        pixels = rng.integers(0, most, (7, 6, 5, 3), dtype=np.uint8)
        np.savez(tmp_path / "mine.npz", x_train=pixels, y_train=np.arange(7) % 2)
        found = measure(DataConfig(f"npy:{tmp_path / 'mine.npz'}"))
        assert found.images == 7
        np.testing.assert_allclose(found.mean, (pixels / 255).mean(axis=(0, 1, 2)), rtol=1e-9)
        np.testing.assert_allclose(found.std, (pixels / 255).std(axis=(0, 1, 2)), rtol=1e-9)
