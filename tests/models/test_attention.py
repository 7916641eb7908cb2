"""Attention as a function in C: the equations, and when it is run."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tnt_jax.models.formulations import attention
from tnt_jax.models.kernels.cpu import library
from tnt_jax.models.layers import Attention
from tnt_jax.models.variants import model_config


def make_attention(dim, heads, **fields):
    config = dataclasses.replace(model_config("tnt_s_patch16_224"), **fields)
    layer = Attention(dim, heads, config=config, rngs=nnx.Rngs(0))
    layer.qkv.kernel[...] *= 5  # weights that are far from equal
    return layer


def random_tokens(batch, tokens, dim):
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, tokens, dim)), jnp.float32)


def results(layer, x):
    """What a layer returns, and the gradients of what it is given and of its parameters, for a fixed cotangent."""
    graphdef, params = nnx.split(layer)
    cotangent = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)

    @jax.jit
    def value_and_gradients(params, x):
        def weighted(params, x):
            out = nnx.merge(graphdef, params)(x)
            return (out * cotangent).sum(), out

        return jax.grad(weighted, argnums=(0, 1), has_aux=True)(params, x)

    return jax.tree.leaves(value_and_gradients(params, x))


@pytest.mark.parametrize(
    ("batch", "tokens", "dim", "heads"),
    [
        (2, 197, 384, 6),  # TNT-S
        (1, 64, 40, 4),  # a block of queries, heads that fill no vector
        (3, 5, 24, 2),
        (1, 1, 7, 1),
        (1, 577, 64, 1),  # 384 x 384 pixels
    ],
)
def test_native_is_the_reference(batch, tokens, dim, heads):
    x = random_tokens(batch, tokens, dim)
    native, reference = (results(make_attention(dim, heads, inner=how), x) for how in ("native", "reference"))
    for one, other in zip(native, reference, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize(("batch", "tokens", "dim", "heads"), [(2, 197, 384, 6), (3, 5, 24, 2)])
def test_native_in_bfloat16_errs_less_than_plain_jax(batch, tokens, dim, heads):
    """Of what is returned and of each gradient, the root of the mean squared error."""
    x = random_tokens(batch, tokens, dim).astype(jnp.bfloat16)
    native, plain, exact = (
        results(make_attention(dim, heads, inner=how, dtype=dtype), x.astype(dtype))
        for how, dtype in (("native", "bfloat16"), ("reference", "bfloat16"), ("reference", "float32"))
    )
    for one, other, right in zip(native, plain, exact, strict=True):
        assert one.dtype == other.dtype
        error, of_plain = (np.sqrt(np.mean((np.float32(each) - np.float32(right)) ** 2)) for each in (one, other))
        assert error <= of_plain


@pytest.mark.parametrize(
    ("fields", "training", "native"),
    [
        ({}, True, True),
        ({"inner": "reference"}, False, False),
        ({"dtype": "bfloat16"}, True, True),
        ({"attn_drop_rate": 0.1}, True, False),
        ({"attn_drop_rate": 0.1}, False, True),
    ],
)
def test_when_native_is_run(fields, training, native):
    layer, x = make_attention(24, 2, **fields), random_tokens(1, 5, 24)
    program = jax.make_jaxpr(lambda x: layer(x, jax.random.key(0) if training else None))(x)
    assert ("ffi_call" in str(program)) == native


def test_a_bias_of_the_logits_and_a_machine_without_a_compiler_take_the_equations(monkeypatch):
    layer, reference = (make_attention(24, 2, inner=how) for how in ("auto", "reference"))
    x, bias = random_tokens(2, 5, 24), random_tokens(2, 5, 5)[None]
    np.testing.assert_array_equal(layer(x, bias=bias), reference(x, bias=bias))
    monkeypatch.setattr(library, "compiled", lambda name: False)
    np.testing.assert_array_equal(layer(x), reference(x))


@pytest.mark.parametrize("tokens", [pytest.param(197, marks=pytest.mark.slow), 16])
def test_padding_for_cudnn_changes_nothing(tokens):
    """As far as it can be proven without a GPU: XLA in the place of cuDNN, with the same lengths."""
    layer, x = make_attention(64, 2, inner="reference"), random_tokens(2, tokens, 64)

    def padded(layer, x):
        return layer.proj(attention.cudnn(2, layer.qkv(x), "xla"))

    (out, backward), (expected, of_layer) = (jax.vjp(run, x) for run in (functools.partial(padded, layer), layer))
    for one, other in ((out, expected), (backward(x)[0], of_layer(x)[0])):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("asked", "dtype", "dim", "card", "has_bias", "chosen"),
    [
        ("cuda", "bfloat16", 384, (9.0, 132), False, "cudnn"),
        ("auto", "bfloat16", 384, (9.0, 132), False, "reference"),
        ("cuda", "float32", 384, (9.0, 132), False, "reference"),
        ("cuda", "bfloat16", 24, (9.0, 132), False, "reference"),  # heads of 4 channels
        ("cuda", "bfloat16", 384, (7.5, 40), False, "reference"),
        ("cuda", "bfloat16", 384, "another card", False, "reference"),
        ("cuda", "bfloat16", 384, (9.0, 132), True, "reference"),
    ],
)
def test_where_cudnn_runs(on_platform, monkeypatch, asked, dtype, dim, card, has_bias, chosen):
    on_platform("gpu")
    monkeypatch.setattr(attention, "gpu", lambda: card)
    layer = make_attention(dim, 6, inner=asked, dtype=dtype)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
    assert attention.choose_attention(layer, 8, has_bias=has_bias, training=True) == chosen
