"""The gradients that are written out are those of the plain formulas, and of PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tnt_jax.models.formulations import gradients
from tnt_jax.models.formulations.gradients import (
    layer_norm,
    parameter_add,
    parameter_einsum,
    product,
    softmax,
)

EPSILON = 1e-5


def plain_layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPSILON) * scale + bias


CASES = {
    "softmax": (softmax, jax.nn.softmax, [(5, 3, 16, 16)]),
    "scores of words": (product, jnp.matmul, [(7, 4, 16, 6), (7, 4, 6, 16)]),
    "words attended": (product, jnp.matmul, [(7, 4, 16, 16), (7, 4, 16, 6)]),
    "few queries, wide heads": (product, jnp.matmul, [(2, 3, 16), (2, 16, 5)]),
    "layer norm": (lambda *of: layer_norm(*of, EPSILON), plain_layer_norm, [(200, 24), (24,), (24,)]),
    "layer norm of one row": (lambda *of: layer_norm(*of, EPSILON), plain_layer_norm, [(1, 384), (384,), (384,)]),
}


def random(shapes):
    rng = np.random.default_rng(0)
    # Off centre, as the residual stream is.
    return [jnp.asarray(0.5 + rng.standard_normal(shape), jnp.float32) for shape in shapes]


def value_and_gradients(function, arguments):
    value, pull = jax.vjp(function, *arguments)
    return [value, *pull(random([value.shape])[0])]


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        other = np.asarray(other)
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint, jax.vmap], ids=["jit", "checkpoint", "vmap"])
@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_plain_formula(case, around):
    ours, plain, shapes = CASES[case]
    arguments = random([(2, *shape) if around is jax.vmap else shape for shape in shapes])
    plain = jax.vmap(plain) if around is jax.vmap else plain
    assert_close(value_and_gradients(around(ours), arguments), value_and_gradients(plain, arguments))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("offset", [0, 10], ids=["near zero", "far from zero"])
def test_layer_norm_is_that_of_pytorch(monkeypatch, platform, offset):
    monkeypatch.setattr(gradients, "platform", lambda: platform)
    arguments = random([(200, 24), (24,), (24,)])
    arguments[0] += offset
    x, scale, bias = (torch.tensor(np.asarray(each), requires_grad=True) for each in arguments)
    out = torch.nn.functional.layer_norm(x, (24,), scale, bias, EPSILON)
    out.backward(torch.tensor(np.asarray(random([out.shape])[0])))
    actual = value_and_gradients(lambda *of: layer_norm(*of, EPSILON), arguments)
    assert_close(actual, [out.detach(), x.grad, scale.grad, bias.grad])


def test_layer_norm_of_low_precision_is_summed_in_high():
    x = jnp.asarray(1000 + np.random.default_rng(0).standard_normal((4, 512)), jnp.bfloat16)
    ones, zeros = jnp.ones(512), jnp.zeros(512)
    out, pull = jax.vjp(lambda *of: layer_norm(*of, EPSILON), x, ones, zeros)
    assert [gradient.dtype for gradient in pull(out)] == [jnp.bfloat16, jnp.float32, jnp.float32]
    expected = torch.nn.functional.layer_norm(torch.tensor(np.asarray(x, np.float32)), (512,))
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-2)


def test_attention_is_that_of_pytorch():
    arguments = random([(3, 4, 16, 6)] * 3)
    tensors = [torch.tensor(np.asarray(each), requires_grad=True) for each in arguments]
    out = torch.nn.functional.scaled_dot_product_attention(*tensors)
    out.backward(torch.tensor(np.asarray(random([out.shape])[0])))

    def attention(query, keys, value):
        return product(softmax(product(query * 6**-0.5, keys.mT)), value)

    assert_close(value_and_gradients(attention, arguments), [out.detach(), *(each.grad for each in tensors)])


@pytest.mark.parametrize(
    ("platform", "dtype", "own"), [("cpu", "float32", True), ("cpu", "bfloat16", False), ("tpu", "float32", False)]
)
def test_where_they_are_taken(on_platform, monkeypatch, platform, dtype, own):
    on_platform(platform)
    x = jnp.ones((2, 3, 3), dtype)
    for function in (softmax, lambda x: product(x, x)):
        # Not the trace of another case, which JAX remembers by the function.
        jaxpr = jax.make_jaxpr(lambda x, function=function: function(x))(x)
        assert any("custom_vjp" in str(equation.primitive) for equation in jaxpr.eqns) == own


def test_sums_of_low_precision_are_taken_in_high():
    a = jnp.full((1, 300), 1.01, jnp.bfloat16)
    assert product(a, a.mT, jnp.float32).dtype == jnp.float32


def test_gradients_of_parameters_are_those_of_float32_parameters():
    """Of a bfloat16 product and sum: not rounded on the way, so that what devices add up is float32."""
    x, kernel, bias = random([(4, 64, 24), (24, 8), (1, 64, 8)])
    x = x.astype(jnp.bfloat16)

    def ours(kernel, bias):
        return parameter_add(parameter_einsum("bnd,de->bne", x, kernel), bias)

    out, pull = jax.vjp(ours, kernel, bias)
    assert out.dtype == jnp.bfloat16
    slope = jnp.asarray(random([out.shape])[0], jnp.bfloat16)
    wide = slope.astype(jnp.float32)
    expected = [jnp.einsum("bnd,bne->de", x.astype(jnp.float32), wide), wide.sum(0, keepdims=True)]
    assert_close(pull(slope), expected)
    exact = x.astype(jnp.float32) @ kernel + bias
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=1e-2 * np.abs(exact).max())


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 7), (1576, 40, 24)])
def test_on_cpus_bfloat16_is_multiplied_as_bfloat16(shape):
    """Forward and both gradients: XLA's fast products return float32, and take no transposed matrix."""
    rows, inputs, outputs = shape
    x, kernel, cotangent = random([(rows, inputs), (inputs, outputs), (rows, outputs)])
    x, cotangent = x.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)

    def gradients(x, kernel):
        return jax.vjp(functools.partial(parameter_einsum, "ni,io->no"), x, kernel)[1](cotangent)

    program = str(jax.make_jaxpr(gradients)(x, kernel))
    assert "tnt_jax_transpose" in program
    assert program.count("preferred_element_type=float32") == program.count("dot_general")
    of_x, of_kernel = jax.jit(gradients)(x, kernel)
    x, rounded, cotangent = (np.asarray(each.astype(jnp.bfloat16), np.float64) for each in (x, kernel, cotangent))
    np.testing.assert_allclose(of_kernel, x.T @ cotangent, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(of_x, np.float64), cotangent @ rounded.T, rtol=4e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8), (4, 1, 8)])
def test_gradient_of_a_bias_is_that_of_the_sum(shape):
    x, bias = random([(4, 5, 8), shape])
    assert_close(value_and_gradients(parameter_add, [x, bias]), value_and_gradients(jnp.add, [x, bias]))


def test_on_gpus_they_are_summed_up_over_rows(monkeypatch):
    """XLA's GPU backend transposes what is summed up over several axes."""
    monkeypatch.setattr(gradients, "platform", lambda: "gpu")
    arguments = random([(4, 5, 24), (24,), (24,)])

    def ours(x, scale, bias):
        return parameter_add(layer_norm(x, scale, bias, EPSILON), bias)

    def plain(x, scale, bias):
        return plain_layer_norm(x, scale, bias) + bias

    assert_close(value_and_gradients(ours, arguments), value_and_gradients(plain, arguments))
    program = str(jax.make_jaxpr(functools.partial(value_and_gradients, ours))(arguments))
    assert "reduce_sum[axes=(0,)" in program
    assert "reduce_sum[axes=(0, 1)" not in program
