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
