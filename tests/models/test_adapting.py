"""A model for other channels gives what the model for colours gives of the same picture, and has timm's filters."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from others import timm

import tnt_jax
from tnt_jax.models.adapting import adapt_channels, resize_position_bias

SIZES = {
    "tnt_ti_patch16_224": {"depth": 1, "image_size": 32},
    "ptnt_ti_patch16_192": {"image_size": 64, "depth": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
def test_filters_are_those_of_timm(channels):
    kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 5)).astype(np.float32)
    theirs = timm.models.adapt_input_conv(channels, torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    np.testing.assert_allclose(adapt_channels(kernel, channels), theirs.numpy().transpose(2, 3, 1, 0), rtol=1e-6)


@pytest.mark.parametrize("new", [(6, 4, 3, 2), (3, 2, 2, 1)])
def test_the_bias_of_pairs_is_resized_as_pytorch_resizes_pictures(new):
    """Over the places of queries, then over those of keys."""
    old, bias = (4, 4, 2, 2), np.random.default_rng(0).normal(size=(1, 3, 16, 4)).astype(np.float32)
    resize = {"mode": "bicubic", "antialias": True, "align_corners": False}
    maps = torch.from_numpy(bias.reshape(3, *old).transpose(0, 3, 4, 1, 2)).reshape(3, 4, 4, 4)
    maps = torch.nn.functional.interpolate(maps, new[:2], **resize).reshape(3, 2, 2, *new[:2]).permute(0, 3, 4, 1, 2)
    maps = torch.nn.functional.interpolate(maps.reshape(3, -1, 2, 2), new[2:], **resize)
    expected = maps.reshape(1, 3, new[0] * new[1], new[2] * new[3]).numpy()
    np.testing.assert_allclose(resize_position_bias(bias, old, new), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.nightly if name.startswith("ptnt") else ()) for name in SIZES],
)
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
