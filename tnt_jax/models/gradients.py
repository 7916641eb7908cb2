"""What the layers compute with gradients that are written out: faster, smaller or more exact than JAX's own.

Values and gradients are those of the plain formulas.

- Softmax, batched products and layer norm. XLA's CPU backend has fast kernels for products that contract the last axis
  from the left, and for no other; means over few channels it computes fastest as products with a matrix of ones. On a
  CPU these forms are taken; elsewhere XLA's own gradients are, but for layer norm, which keeps less for its gradient on
  all platforms.
- Products with parameters, and sums with them: in a bfloat16 network the parameters' gradients are float32.

What has its gradient written out cannot be differentiated forward (`jax.jvp`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LINEAR = "linear"
"""The name of what linear maps return, for rematerialisation."""


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
    x: Float[Array, "*rows n"], scale: Float[Array, " n"], bias: Float[Array, " n"], epsilon: float
) -> Float[Array, "*rows n"]:
    """Each row less its mean, over its standard deviation, times `scale`, plus `bias`; computed in float32.

    For its gradient it keeps what it was given and two numbers for each row. XLA would keep two float32 copies of it.
    """
    return _normalised(x, scale, bias, epsilon, lambda x: x.mean(-1, keepdims=True))[0]


def _normalised(x: Array, scale: Array, bias: Array, epsilon: float, mean_of: Callable) -> tuple[Array, Array, Array]:
    x32 = x.astype(jnp.float32)
    mean = mean_of(x32)
    # E[x^2] - E[x]^2 would lose digits that the golden records have.
    inverse = jax.lax.rsqrt(mean_of(jnp.square(x32 - mean)) + epsilon)
    out = (x32 - mean) * (inverse * scale.astype(jnp.float32)) + bias.astype(jnp.float32)
    return out.astype(x.dtype), mean, inverse


def _mean(x: Float[Array, "*rows n"]) -> Float[Array, "*rows 1"]:
    if platform() != "cpu":
        return x.mean(-1, keepdims=True)
    n, columns = x.shape[-1], 8  # with a single column XLA compiles each such product by itself, hundreds of them
    return (x.reshape(-1, n) @ jnp.full((n, columns), 1 / n, x.dtype))[:, :1].reshape(*x.shape[:-1], 1)


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    out, mean, inverse = _normalised(x, scale, bias, epsilon, _mean)
    return out, (x, mean, inverse, scale, bias)


def _layer_norm_backward(epsilon: float, saved: tuple[Array, ...], slope: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale, bias = saved
    normed, slope = (x.astype(jnp.float32) - mean) * inverse, slope.astype(jnp.float32)
    of_normed = slope * scale.astype(jnp.float32)
    of_x = (of_normed - _mean(of_normed) - normed * _mean(of_normed * normed)) * inverse
    rows = range(x.ndim - 1)
    of_scale, of_bias = (slope * normed).sum(rows), slope.sum(rows)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def with_kernel(equation: str, x: Array, kernel: Float[Array, "..."]) -> Array:
    """`jnp.einsum(equation, x, kernel)` in the dtype of `x`, with the gradient of the kernel in that of the kernel.

    In plain JAX the gradient of a float32 parameter of a bfloat16 network is bfloat16 until the last moment: each
    device rounds its part of the batch's sum before the parts are added up.
    """
    plain = x.dtype == kernel.dtype
    out = jnp.einsum(equation, x, kernel) if plain else _with_kernel(equation, x, kernel)
    return checkpoint_name(out, LINEAR)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_kernel(equation: str, x: Array, kernel: Array) -> Array:
    return jnp.einsum(equation, x, kernel.astype(x.dtype))


def _with_kernel_forward(equation: str, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _with_kernel(equation, x, kernel), (x, kernel)


def _with_kernel_backward(equation: str, saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, kernel = saved
    inputs, result = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    dx = jnp.einsum(f"{result},{of_kernel}->{of_x}", slope, kernel.astype(x.dtype))
    return dx, jnp.einsum(f"{of_x},{result}->{of_kernel}", x, slope, preferred_element_type=kernel.dtype)


_with_kernel.defvjp(_with_kernel_forward, _with_kernel_backward)


@jax.custom_vjp
def with_bias(x: Float[Array, "*batch n"], bias: Float[Array, "*positions n"]) -> Float[Array, "*batch n"]:
    """The sum in the dtype of `x`, with the gradient of the bias, or of positions, in that of the bias."""
    return x + bias.astype(x.dtype)


def _with_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return with_bias(x, bias), bias


def _with_bias_backward(bias: Array, slope: Array) -> tuple[Array, Array]:
    missing = slope.ndim - bias.ndim
    repeated = [axis for axis in range(slope.ndim) if axis < missing or bias.shape[axis - missing] == 1]
    return slope, slope.sum(repeated, dtype=bias.dtype).reshape(bias.shape)


with_bias.defvjp(_with_bias_forward, _with_bias_backward)
