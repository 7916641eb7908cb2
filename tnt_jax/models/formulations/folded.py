"""A norm, a linear map and a norm, as words become sentences, in few passes over memory.

The first norm is folded into the linear map. With x of width n, its mean m and its deviation s,

    norm(x) W + b = (x - m) / s (scale W) + (bias W + b) = x M / s + c

where M is scale W less the mean of each of its columns: since they sum to zero, the product takes the mean away by
itself. So x goes into the product as it is, no normalised copy of it is written or kept, and the gradients of scale and
bias come from those of M and c, which are as small as the parameters.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Rows = Float[Array, "rows inputs"]
Outputs = Float[Array, "rows outputs"]


class NormParameters(NamedTuple):
    """Its parameters, in float32."""

    scale: Float[Array, " n"]
    bias: Float[Array, " n"]


def norm_linear_norm(
    epsilon: float,
    multiprocessors: int | None,
    x: Rows,
    first: NormParameters,
    matrix: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None,
    last: NormParameters,
) -> Outputs:
    """last(first(x) matrix + bias) in the dtype of x, with statistics and sums in float32.

    Args:
        multiprocessors: of the GPU whose kernel takes the gradient up to the product; None for XLA's.
        matrix: in float32, as the bias.
    """
    scaled = first.scale[:, None] * matrix
    offset = jnp.matmul(first.bias, matrix, precision=jax.lax.Precision.HIGHEST)
    offset = offset if bias is None else offset + bias
    return _folded(epsilon, multiprocessors, x, scaled - scaled.mean(0), offset, *last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _folded(
    epsilon: float, multiprocessors: int | None, x: Array, centred: Array, offset: Array, scale: Array, bias: Array
) -> Outputs:
    return _forward(epsilon, multiprocessors, x, centred, offset, scale, bias)[0]


def _forward(epsilon: float, _, x: Array, centred: Array, offset: Array, scale: Array, bias: Array):
    product = x @ centred.astype(x.dtype)
    statistics = _statistics(x.astype(jnp.float32), epsilon)
    y = _before_norm(product, statistics, _left_over(centred, x)) + offset
    mean, inverse = _statistics(y, epsilon)
    out = ((y - mean) * (inverse * scale) + bias).astype(x.dtype)
    return out, (x, centred, offset, scale, product, statistics)


def _statistics(x: Float[Array, "rows n"], epsilon: float) -> tuple[Float[Array, "rows 1"], Float[Array, "rows 1"]]:
    """The mean of each row, and the inverse of its deviation."""
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)


def _left_over(centred: Array, x: Array) -> Float[Array, " outputs"]:
    """The sums of the matrix's columns after rounding: so much of the mean the product leaves."""
    return centred.astype(x.dtype).astype(jnp.float32).sum(0)


def _before_norm(product: Array, statistics: tuple[Array, Array], left_over: Array) -> Outputs:
    """The input of the last norm, but for the offset."""
    mean, inverse = statistics
    return (product.astype(jnp.float32) - mean * left_over) * inverse


def _backward(epsilon: float, multiprocessors: int | None, saved: tuple, cotangent: Outputs) -> tuple[Array, ...]:
    x, centred, offset, scale, product, (mean, inverse) = saved
    if multiprocessors is None:
        gradient = _up_to_product(epsilon, saved, cotangent)
    else:
        from tnt_jax.models.kernels.gpu.norm_gradient import norm_gradient
        from tnt_jax.models.kernels.gpu.sizes import Rows as Sizes

        vectors = jnp.stack([offset, _left_over(centred, x), scale])
        sizes = Sizes(*centred.shape, epsilon)
        statistics = jnp.concatenate([mean, inverse], axis=1)
        gradient = norm_gradient(sizes, multiprocessors, product, statistics, cotangent, vectors)
    of_product, through, of_offset, of_scale, of_bias = gradient
    of_x = (of_product @ centred.astype(x.dtype).T).astype(jnp.float32)
    of_x = (of_x - through[:, None] * (x.astype(jnp.float32) - mean)).astype(x.dtype)
    # The mean's part in the gradient of the matrix is the same for each of its rows: centring takes it away.
    of_matrix = jnp.matmul(x.T, of_product, preferred_element_type=jnp.float32)
    return of_x, of_matrix, of_offset, of_scale, of_bias


def _up_to_product(epsilon: float, saved: tuple, cotangent: Outputs) -> tuple[Array, ...]:
    """The gradients that reach the product, the rows of x through their deviation, the offset, and the last norm."""
    x, centred, offset, scale, product, (mean, inverse) = saved
    cotangent = cotangent.astype(jnp.float32)
    y = _before_norm(product, (mean, inverse), _left_over(centred, x))
    last_mean, last_inverse = _statistics(y + offset, epsilon)
    normed = (y + offset - last_mean) * last_inverse
    of_normed = cotangent * scale
    along = (of_normed * normed).mean(-1, keepdims=True)
    of_y = last_inverse * (of_normed - of_normed.mean(-1, keepdims=True) - normed * along)
    of_product = (of_y * inverse).astype(x.dtype)
    # Of the gradient of norm(x), what lies along norm(x) is what lies along y of the gradient of y.
    through = (of_y * y).sum(-1) * jnp.square(inverse[:, 0]) / x.shape[-1]
    return of_product, through, of_y.sum(0), (cotangent * normed).sum(0), cotangent.sum(0)


_folded.defvjp(_forward, _backward)
