"""Layers against PyTorch's, values and gradients, however they are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tnt_jax.models import layers
from tnt_jax.models.formulations import attention
from tnt_jax.models.variants import model_config

CONFIG = model_config("tnt_s_patch16_224")


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        other = other.detach().numpy()
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


def to_torch(*arrays):
    return [torch.tensor(np.asarray(array), requires_grad=True) for array in arrays]


@pytest.mark.parametrize(("platform", "inner"), [("cpu", "native"), ("cpu", "reference"), ("tpu", "auto")])
def test_attention_is_pytorchs(monkeypatch, platform, inner):
    """What is computed for a TPU is other products of the same parameters."""
    monkeypatch.setattr(attention, "platform", lambda: platform)
    random = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, inner=inner)
    layer = layers.Attention(48, 6, config=config, rngs=nnx.Rngs(0))
    layer.proj.bias[...] = jnp.asarray(random.standard_normal(48), jnp.float32)
    x, cotangent = (random.standard_normal((3, 7, 48)).astype(np.float32) for _ in range(2))
    graphdef, params = nnx.split(layer)
    out, gradients = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    found, dx = gradients(jnp.asarray(cotangent))

    kernels = [layer.qkv.kernel[...], layer.proj.kernel[...], layer.proj.bias[...]]
    theirs = to_torch(x, *kernels)
    query, key, value = (theirs[0] @ theirs[1]).reshape(3, 7, 3, 6, 8).permute(2, 0, 3, 1, 4)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(3, 7, 48)
    expected = attended @ theirs[2] + theirs[3]
    expected.backward(torch.tensor(cotangent))
    ours = [out, dx, found.qkv.kernel[...], found.proj.kernel[...], found.proj.bias[...]]
    assert_close(ours, [expected, *(array.grad for array in theirs)])


def test_dropout_falls_on_the_hidden_channels_and_on_the_outputs_and_keeps_their_mean():
    """By mean and variance over many tokens that are the same."""
    rate = 0.25
    config = dataclasses.replace(CONFIG, drop_rate=rate)
    mlp = layers.Mlp(6, config=config, rngs=nnx.Rngs(0))
    token = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 6)), jnp.float32)
    mlp.fc1.bias[...] += 0.5
    found = np.asarray(mlp(jnp.tile(token, (20, 1000, 1)), jax.random.key(0)), np.float64).reshape(-1, 6)
    without = np.asarray(mlp(token))[0, 0]
    hidden = torch.nn.functional.gelu(torch.tensor(np.asarray(mlp.fc1(token)))).numpy()[0, 0]
    np.testing.assert_allclose(hidden @ mlp.fc2.kernel[...] + mlp.fc2.bias[...], without, atol=1e-5)
    spread = rate / (1 - rate)  # the variance of what a 1 becomes
    of_hidden = spread * np.square(hidden[:, None] * np.asarray(mlp.fc2.kernel[...])).sum(axis=0)
    expected = (1 + spread) * (of_hidden + without**2) - without**2
    np.testing.assert_allclose(found.var(axis=0), expected, rtol=0.1)
    np.testing.assert_allclose(found.mean(axis=0), without, atol=5 * np.sqrt(expected.max() / len(found)))
