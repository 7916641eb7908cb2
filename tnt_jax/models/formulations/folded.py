"""A norm, a linear map and a norm, as words become sentences, in few passes over memory.

The first norm is folded into the linear map. With x of width n, its mean m and its deviation s,

    norm(x) W + b = (x - m) / s (scale W) + (bias W + b) = x M / s + c

where M is scale W less the mean of each of its columns: since they sum to zero, the product takes the mean away by
itself. So x goes into the product as it is, no normalised copy of it is written or kept, and the gradients of scale and
bias come from those of M and c, which are as small as the parameters.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Rows = Float[Array, "rows inputs"]
Outputs = Float[Array, "rows outputs"]


def norm_linear_norm(
    epsilon: float,
    x: Rows,
    first: tuple[Float[Array, " inputs"], Float[Array, " inputs"]],
    matrix: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None,
    last: tuple[Float[Array, " outputs"], Float[Array, " outputs"]],
) -> Outputs:
    """norm(norm(x) matrix + bias) in the dtype of x, with statistics and sums in float32.

    Args:
        first: scale and bias of the first norm; parameters are in float32.
        last: those of the last one.
    """
    scaled = first[0][:, None] * matrix
    offset = jnp.matmul(first[1], matrix, precision=jax.lax.Precision.HIGHEST)
    return _folded(epsilon, x, scaled - scaled.mean(0), offset if bias is None else offset + bias, *last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _folded(epsilon: float, x: Array, centred: Array, offset: Array, scale: Array, bias: Array) -> Outputs:
    return _forward(epsilon, x, centred, offset, scale, bias)[0]


def _forward(epsilon: float, x: Array, centred: Array, offset: Array, scale: Array, bias: Array):
    product = x @ centred.astype(x.dtype)
    statistics = _statistics(x.astype(jnp.float32), epsilon)
    y = _linear(product, statistics, _left_over(centred, x), offset)
    last = _statistics(y, epsilon)
    out = ((y - last[0]) * (last[1] * scale) + bias).astype(x.dtype)
    return out, (x, centred, offset, scale, product, statistics, last)


def _statistics(x: Float[Array, "rows n"], epsilon: float) -> tuple[Float[Array, "rows 1"], Float[Array, "rows 1"]]:
    """The mean of each row, and the inverse of its deviation."""
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)


def _left_over(centred: Array, x: Array) -> Float[Array, " outputs"]:
    """What the columns of the matrix sum up to after rounding: so much of the mean the product leaves."""
    return centred.astype(x.dtype).astype(jnp.float32).sum(0)


def _linear(product: Array, statistics: tuple[Array, Array], left_over: Array, offset: Array) -> Outputs:
    mean, inverse = statistics
    return (product.astype(jnp.float32) - mean * left_over) * inverse + offset


def _backward(epsilon: float, saved: tuple, cotangent: Outputs) -> tuple[Array, ...]:
    x, centred, offset, scale, product, (mean, inverse), (last_mean, last_inverse) = saved
    cotangent = cotangent.astype(jnp.float32)
    y = _linear(product, (mean, inverse), _left_over(centred, x), offset)
    normed = (y - last_mean) * last_inverse
    of_normed = cotangent * scale
    along = (of_normed * normed).mean(-1, keepdims=True)
    of_y = last_inverse * (of_normed - of_normed.mean(-1, keepdims=True) - normed * along)
    of_product = (of_y * inverse).astype(x.dtype)
    # Through the deviation of x: its product with the gradient of norm(x) is that of y with the gradient of y.
    through = (of_y * (y - offset)).sum(-1, keepdims=True) * jnp.square(inverse) / x.shape[-1]
    of_x = jnp.matmul(of_product, centred.astype(x.dtype).T, preferred_element_type=jnp.float32)
    of_x = (of_x - through * (x.astype(jnp.float32) - mean)).astype(x.dtype)
    # The mean's part in the gradient of the matrix is the same for each of its rows: centring takes it away.
    of_matrix = jnp.matmul(x.T, of_product, preferred_element_type=jnp.float32)
    return of_x, of_matrix, of_y.sum(0), (cotangent * normed).sum(0), cotangent.sum(0)


_folded.defvjp(_forward, _backward)
