"""The outer transformer layer as one TPU kernel computes what the equations do, with the same gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tnt_jax.models.formulations import outer
from tnt_jax.models.layers import TransformerLayer
from tnt_jax.models.variants import model_config

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def make_layer(dim, heads, **fields):
    config = dataclasses.replace(model_config("tnt_s_patch16_224"), inner="reference", **fields)
    layer = TransformerLayer(dim, heads, 0.3, config=config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    # Fresh parameters have zero biases and near equal attention weights, which hide mistakes.
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype), layer)


def results(layer, x, run):
    """What a layer returns, and the gradients of its tokens and parameters, for a fixed cotangent."""
    graphdef, params = nnx.split(layer)
    shape = jax.eval_shape(lambda x: run(layer, x), x).shape
    cotangent = np.random.default_rng(2).standard_normal(shape)

    @jax.jit
    def value_and_gradients(params, x):
        def weighted(params, x):
            out = run(nnx.merge(graphdef, params), x).astype(jnp.float32)
            return (out * cotangent).sum(), out

        gradients, out = jax.grad(weighted, argnums=(0, 1), has_aux=True)(params, x)
        return out, gradients

    return jax.tree.leaves(value_and_gradients(params, x))


def random_tokens(batch, tokens, dim, dtype):
    return jnp.asarray(np.random.default_rng(3).standard_normal((batch, tokens, dim)), dtype)


@pytest.mark.parametrize("key", [None, 7], ids=["evaluation", "stochastic depth"])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dtype", "with_added"),
    [
        (3, 10, 2, "float32", False),
        (5, 17, 2, "float32", True),
        (1, 16, 2, "float32", True),  # 15 patches: XLA adds
        (2, 197, 4, "float32", True),
        (6, 37, 2, "bfloat16", True),
    ],
)
def test_pallas_is_the_reference(batch, tokens, heads, dtype, with_added, key):
    dim = 64 * heads
    x = random_tokens(batch, 2 * tokens - 1 if with_added else tokens, dim, dtype)
    key = None if key is None else jax.random.key(key)

    def run(layer, x, *, kernel):
        x, added = (x[:, :tokens], x[:, tokens:]) if with_added else (x, None)
        if kernel:
            return outer.pallas(layer, x, key, added, interpret=True)
        return layer.reference(x if added is None else outer.add_to_patches(x, added), key)

    expected = results(make_layer(dim, heads), x.astype(jnp.float32), functools.partial(run, kernel=False))
    actual = results(make_layer(dim, heads, dtype=dtype), x, functools.partial(run, kernel=True))
    for one, other in zip(actual, expected, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, atol=TOLERANCE[dtype] * np.abs(other).max(), rtol=0)
