"""Softmax, batched products and layer norm with gradients in the form that a CPU computes fast.

Values and gradients are those of the plain formulas. XLA's CPU backend has fast kernels for products that contract the
last axis from the left, and for no other; sums over few channels, or over all rows, it computes fastest as products
with a vector of ones. In float32 on a CPU these forms are taken. Elsewhere XLA's own gradients are: a TPU knows all
these sums and transposes. Forward-mode differentiation (`jax.jvp`) has the plain formulas alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def platform() -> str:
    """What is being traced for: cpu, gpu or tpu."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def written_out(x: Array) -> bool:
    """Whether gradients are taken in the forms of this file."""
    return platform() == "cpu" and x.dtype == jnp.float32


def softmax(logits: Float[Array, "*leading n"]) -> Float[Array, "*leading n"]:
    """Softmax of the last axis."""
    return _softmax(logits) if written_out(logits) else jax.nn.softmax(logits)


@jax.custom_vjp
def _softmax(logits: Float[Array, "*leading n"]) -> Float[Array, "*leading n"]:
    return jax.nn.softmax(logits)


def _softmax_forward(logits: Array) -> tuple[Array, Array]:
    weights = jax.nn.softmax(logits)
    return weights, weights


def _softmax_backward(weights: Array, slope: Array) -> tuple[Array]:
    return (weights * (slope - (weights * slope).sum(-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def product(
    a: Float[Array, "*leading m k"], b: Float[Array, "*leading k n"], dtype: DTypeLike | None = None
) -> Float[Array, "*leading m n"]:
    """The matrix products a @ b, summed up and returned in `dtype`."""
    return _product(a, b) if written_out(a) else jnp.matmul(a, b, preferred_element_type=dtype)


@jax.custom_vjp
def _product(a: Float[Array, "*leading m k"], b: Float[Array, "*leading k n"]) -> Float[Array, "*leading m n"]:
    return a @ b


def _product_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return a @ b, (a, b)


def _product_backward(operands: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    a, b = operands
    # a^T slope contracts rows: the narrower of the two is turned first, and XLA is kept from taking that back.
    narrow_a = a.shape[-1] <= slope.shape[-1]
    of_b = _fixed(_fixed(a.mT) @ slope) if narrow_a else _fixed(_fixed(slope.mT) @ a).mT
    return slope @ b.mT, of_b


_product.defvjp(_product_forward, _product_backward)
_fixed = jax.lax.optimization_barrier


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "rows n"], scale: Float[Array, " n"], bias: Float[Array, " n"], epsilon: float
) -> Float[Array, "rows n"]:
    """Each row less its mean, over its standard deviation, times `scale`, plus `bias`: for `written_out` rows."""
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    return centred * inverse * scale + bias


def _mean(x: Float[Array, "rows n"]) -> Float[Array, "rows 1"]:
    return x @ jnp.full((x.shape[1], 1), 1 / x.shape[1], x.dtype)


def _sum_of_rows(x: Float[Array, "rows n"]) -> Float[Array, " n"]:
    return (jnp.ones((1, x.shape[0]), x.dtype) @ x)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    mean = _mean(x)
    centred = x - mean
    inverse = jax.lax.rsqrt(_mean(centred * centred) + epsilon)
    return centred * inverse * scale + bias, (x, mean, inverse, scale)


def _layer_norm_backward(epsilon: float, saved: tuple[Array, ...], slope: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = saved
    normed = (x - mean) * inverse
    of_normed = slope * scale
    of_x = (of_normed - _mean(of_normed) - normed * _mean(of_normed * normed)) * inverse
    return of_x, _sum_of_rows(slope * normed), _sum_of_rows(slope)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
