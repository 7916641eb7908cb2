"""Functions without parameters that the layers share: GELU, dropout, stochastic depth, keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

NORM_EPSILON = 1e-5  # PyTorch's default, which every published TNT uses; Flax's is 1e-6


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Zeroes elements of `x` with probability `rate` and scales the others by 1 / (1 - rate); without a key, returns
    `x`."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def survivors(count: int, rate: float, key: PRNGKeyArray | None) -> Float[Array, " count"]:
    """Stochastic depth: 0 with probability `rate`, else 1 / (1 - rate); all ones without a key."""
    if key is None or rate == 0:
        return jnp.ones(count)
    return jax.random.bernoulli(key, 1 - rate, (count,)).astype(jnp.float32) / (1 - rate)


def drop_path(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Stochastic depth.

    Drops a residual branch for whole rows of the first axis (an image, or a patch in the inner transformer).
    """
    if key is None or rate == 0:
        return x
    return x * survivors(x.shape[0], rate, key).astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def split_key(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    """`count` independent keys, or as many None when there is no randomness to pass on."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def gelu(x: Array) -> Array:
    """The exact GELU, x times the normal distribution's cumulative function (equation 2)."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))
