"""A model for other channels gives what the model for colours gives of the same picture, and has timm's filters."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from others import timm

import tnt_jax
from tnt_jax.models.adapting import adapt_channels

SIZES = {
    "tnt_ti_patch16_224": {"depth": 1, "image_size": 32},
    "ptnt_ti_patch16_192": {"image_size": 64, "depth": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
def test_filters_are_those_of_timm(channels):
    kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 5)).astype(np.float32)
    theirs = timm.models.adapt_input_conv(channels, torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    np.testing.assert_allclose(adapt_channels(kernel, channels), theirs.numpy().transpose(2, 3, 1, 0), rtol=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_the_same_picture_in_every_channel_gives_the_same(name, tmp_path):
    colours = tnt_jax.create_model(name, num_classes=3, **SIZES[name])
    tnt_jax.save_model(colours, tmp_path / "m")
    height, width = colours.config.image_size
    grey = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 1)), jnp.float32)
    expected = colours(jnp.repeat(grey, 3, axis=-1))
    for channels in (1, 6):
        adapted = tnt_jax.create_model(name, pretrained=tmp_path / "m", in_channels=channels)
        assert len(adapted.description.preprocessing.mean) == channels
        np.testing.assert_allclose(adapted(jnp.repeat(grey, channels, axis=-1)), expected, atol=1e-6)
