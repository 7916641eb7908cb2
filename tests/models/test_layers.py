"""Layers against PyTorch's, values and gradients, however they are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tnt_jax.config import ModelConfig
from tnt_jax.models import layers
from tnt_jax.models.variants import resolve

CONFIG = dataclasses.replace(resolve(ModelConfig()))


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        other = other.detach().numpy()
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


def to_torch(*arrays):
    return [torch.tensor(np.asarray(array), requires_grad=True) for array in arrays]


@pytest.mark.parametrize("offset", [0, 100], ids=["centred", "far from zero"])
def test_layer_norm_is_pytorchs(offset):
    random = np.random.default_rng(0)
    x = (offset + random.standard_normal((3, 5, 24))).astype(np.float32)
    scale, bias, cotangent = (random.standard_normal(shape).astype(np.float32) for shape in ((24,), (24,), x.shape))
    out, gradients = jax.vjp(layers.layer_norm, x, scale, bias)
    theirs = to_torch(x, scale, bias)
    expected = torch.nn.functional.layer_norm(theirs[0], (24,), *theirs[1:], eps=1e-5)
    expected.backward(torch.tensor(cotangent))
    assert_close([out, *gradients(cotangent)], [expected, *(array.grad for array in theirs)])


def test_layer_norm_sums_in_float32():
    x = jnp.asarray(1000 + np.random.default_rng(0).standard_normal((4, 512)), jnp.bfloat16)
    ones, zeros = jnp.ones(512), jnp.zeros(512)
    (dx, dscale, dbias) = jax.vjp(layers.layer_norm, x, ones, zeros)[1](jnp.ones_like(x))
    assert (dx.dtype, dscale.dtype, dbias.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    expected = torch.nn.functional.layer_norm(torch.tensor(np.asarray(x, np.float32)), (512,))
    np.testing.assert_allclose(np.asarray(layers.layer_norm(x, ones, zeros), np.float32), expected, atol=2e-2)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_attention_is_pytorchs(monkeypatch, platform):
    """What is computed for a TPU is other products of the same parameters."""
    monkeypatch.setattr(layers, "platform", lambda: platform)
    random = np.random.default_rng(0)
    attention = layers.Attention(48, 6, config=CONFIG, rngs=layers.InitialRngs(0))
    attention.proj.bias[...] = jnp.asarray(random.standard_normal(48), jnp.float32)
    x, cotangent = (random.standard_normal((3, 7, 48)).astype(np.float32) for _ in range(2))
    graphdef, params = nnx.split(attention)
    out, gradients = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    found, dx = gradients(jnp.asarray(cotangent))

    kernels = [attention.qkv.kernel[...], attention.proj.kernel[...], attention.proj.bias[...]]
    theirs = to_torch(x, *kernels)
    query, key, value = (theirs[0] @ theirs[1]).reshape(3, 7, 3, 6, 8).permute(2, 0, 3, 1, 4)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(3, 7, 48)
    expected = attended @ theirs[2] + theirs[3]
    expected.backward(torch.tensor(cotangent))
    ours = [out, dx, found.qkv.kernel[...], found.proj.kernel[...], found.proj.bias[...]]
    assert_close(ours, [expected, *(array.grad for array in theirs)])
