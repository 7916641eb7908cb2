"""Functions with custom gradients, which are faster, smaller or more exact than JAX's own.

Values and gradients are those of the plain formulas.

- Softmax, batched products and layer norm. XLA's CPU backend has fast kernels for products that contract the last axis
  from the left, and for no other. Means over few channels are fastest as products with a matrix of ones. On CPUs these
  forms are used. Elsewhere the gradients are XLA's own, except that of layer norm, which keeps less on all platforms.
- Products with parameters, and sums with them: in a bfloat16 network the gradients of parameters are float32.

JAX cannot differentiate a custom gradient forward (`jax.jvp`, and so `jax.hessian`). With `plain` each function is the
plain formula, which JAX differentiates in every way: the modules of a model with `inner="reference"` ask for that.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_jax.models import functions
from tnt_jax.models.formulations.devices import has_explicit_axes, on_each_device, platform

LINEAR = "linear"
"""The name of what linear maps return, for rematerialisation."""


def _custom(x: Array, plain: bool) -> bool:
    """True if softmax and products take the forms that are fast on CPUs."""
    return not plain and platform() == "cpu" and x.dtype == jnp.float32


def softmax(logits: Float[Array, "*leading n"], *, plain: bool = False) -> Float[Array, "*leading n"]:
    """Softmax of the last axis."""
    return _softmax(logits) if _custom(logits, plain) else jax.nn.softmax(logits)


@jax.custom_vjp
def _softmax(logits: Float[Array, "*leading n"]) -> Float[Array, "*leading n"]:
    return jax.nn.softmax(logits)


def _softmax_forward(logits: Array) -> tuple[Array, Array]:
    weights = jax.nn.softmax(logits)
    return weights, weights


def _softmax_backward(weights: Array, cotangent: Array) -> tuple[Array]:
    return (weights * (cotangent - (weights * cotangent).sum(-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def product(
    a: Float[Array, "*leading m k"],
    b: Float[Array, "*leading k n"],
    dtype: DTypeLike | None = None,
    *,
    plain: bool = False,
) -> Float[Array, "*leading m n"]:
    """The matrix products a @ b, summed and returned in `dtype`."""
    return _product(a, b) if _custom(a, plain) else jnp.matmul(a, b, preferred_element_type=dtype)


@jax.custom_vjp
def _product(a: Float[Array, "*leading m k"], b: Float[Array, "*leading k n"]) -> Float[Array, "*leading m n"]:
    return a @ b


def _product_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return a @ b, (a, b)


def _product_backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    a, b = operands
    # a^T cotangent contracts rows: the narrower of the two is transposed first, and XLA is kept from undoing that.
    narrow_a = a.shape[-1] <= cotangent.shape[-1]
    of_b = _fixed(_fixed(a.mT) @ cotangent) if narrow_a else _fixed(_fixed(cotangent.mT) @ a).mT
    return cotangent @ b.mT, of_b


_product.defvjp(_product_forward, _product_backward)
_fixed = jax.lax.optimization_barrier


def layer_norm(
    x: Float[Array, "*rows n"],
    scale: Float[Array, " n"],
    bias: Float[Array, " n"],
    epsilon: float,
    *,
    plain: bool = False,
) -> Float[Array, "*rows n"]:
    """Each row less its mean, over its standard deviation, times `scale`, plus `bias`; computed in float32.

    Its custom gradient keeps `x` and two numbers for each row, where XLA would keep two float32 copies of `x`.
    """
    return _plain_layer_norm(x, scale, bias, epsilon) if plain else _layer_norm(x, scale, bias, epsilon)


def _as_rows(x: Float[Array, "*rows n"]) -> Float[Array, "..."]:
    """On GPUs (rows, n), elsewhere as it is.

    To sum up over several axes XLA's GPU backend puts the batch last, and transposes tokens forth and back around each
    norm: a tenth of a train step.
    """
    return x.reshape(-1, x.shape[-1]) if platform() == "gpu" and not has_explicit_axes() else x


def _plain_layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    return _normalised(x, scale, bias, epsilon, lambda x: x.mean(-1, keepdims=True))[0]


_layer_norm = jax.custom_vjp(_plain_layer_norm, nondiff_argnums=(3,))


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
    rows = _as_rows(x)
    out, mean, inverse = _normalised(rows, scale, bias, epsilon, _mean)
    return out.reshape(x.shape), (rows, mean, inverse, scale, bias)


def _layer_norm_backward(epsilon: float, saved: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale, bias = saved
    shape, cotangent = cotangent.shape, _as_rows(cotangent).astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    of_normed = cotangent * scale.astype(jnp.float32)
    of_x = (of_normed - _mean(of_normed) - normed * _mean(of_normed * normed)) * inverse
    rows = range(x.ndim - 1)
    of_scale, of_bias = (cotangent * normed).sum(rows), cotangent.sum(rows)
    return of_x.astype(x.dtype).reshape(shape), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def gelu_of_platform(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU, on CPUs in float32: there each operation on bfloat16 is one on float32 and a rounding."""
    return functions.gelu(x.astype(jnp.float32)).astype(x.dtype) if platform() == "cpu" else functions.gelu(x)


def parameter_einsum(equation: str, x: Array, kernel: Float[Array, "..."], *, plain: bool = False) -> Array:
    """`jnp.einsum(equation, x, kernel)` in the dtype of `x`, with the gradient of the kernel in that of the kernel.

    In plain JAX the gradient of a float32 parameter of a bfloat16 network is bfloat16 until the last moment: each
    device rounds its part of the batch's sum before the parts are added up.
    """
    plain = plain or x.dtype == kernel.dtype == jnp.float32
    out = jnp.einsum(equation, x, kernel.astype(x.dtype)) if plain else _parameter_einsum(equation, x, kernel)
    return checkpoint_name(out, LINEAR)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _parameter_einsum(equation: str, x: Array, kernel: Array) -> Array:
    return _einsum(equation, x, kernel.astype(x.dtype))


def _einsum(equation: str, a: Array, b: Array) -> Array:
    """In the dtype of `a`. On CPUs XLA's products of bfloat16 are twice as fast as float32's, but to float32 alone."""
    to = jnp.float32 if platform() == "cpu" else None
    return jnp.einsum(equation, a, b, preferred_element_type=to).astype(a.dtype)


def _parameter_einsum_forward(equation: str, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _parameter_einsum(equation, x, kernel), (x, kernel)


def _parameter_einsum_backward(equation: str, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    inputs, result = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    dx = _einsum(f"{result},{of_kernel}->{of_x}", cotangent, kernel.astype(x.dtype))
    if x.ndim == 2 and (turned := _transposed(x)) is not None:
        return dx, jnp.matmul(turned, cotangent, preferred_element_type=jnp.float32).astype(kernel.dtype)
    return dx, jnp.einsum(f"{of_x},{result}->{of_kernel}", x, cotangent, preferred_element_type=kernel.dtype)


def _transposed(x: Float[Array, "rows columns"]) -> Float[Array, "columns rows"] | None:
    """Of bfloat16 on CPUs the matrix as XLA's fast products take it; None elsewhere."""
    from tnt_jax.models.kernels.cpu import library
    from tnt_jax.models.kernels.cpu.transpose import transpose

    if x.dtype != jnp.bfloat16 or library.obstacle("transpose", x.dtype, len(x)):
        return None
    return on_each_device(transpose, (0,), 1)(x)


_parameter_einsum.defvjp(_parameter_einsum_forward, _parameter_einsum_backward)


def parameter_add(
    x: Float[Array, "*batch n"], bias: Float[Array, "*positions n"], *, plain: bool = False
) -> Float[Array, "*batch n"]:
    """The sum in the dtype of `x`, with the gradient of the bias, or of positions, in that of the bias."""
    return _plain_parameter_add(x, bias) if plain else _parameter_add(x, bias)


def _plain_parameter_add(x: Array, bias: Array) -> Array:
    return x + bias.astype(x.dtype)


_parameter_add = jax.custom_vjp(_plain_parameter_add)


def _parameter_add_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return _plain_parameter_add(x, bias), bias


def _parameter_add_backward(bias: Array, cotangent: Array) -> tuple[Array, Array]:
    given = cotangent
    if bias.ndim == 1:
        cotangent = _as_rows(cotangent)
    missing = cotangent.ndim - bias.ndim
    repeated = [axis for axis in range(cotangent.ndim) if axis < missing or bias.shape[axis - missing] == 1]
    return given, cotangent.sum(repeated, dtype=bias.dtype).reshape(bias.shape)


_parameter_add.defvjp(_parameter_add_forward, _parameter_add_backward)
