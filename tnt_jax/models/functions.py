"""Functions without parameters that the layers share: GELU, dropout, stochastic depth, keys."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray

NORM_EPSILON = 1e-5  # PyTorch's default, which every published TNT uses; Flax's is 1e-6
Keys = PRNGKeyArray | Key[Array, " images"]
"""One key for a batch, or one for each of its images, which then draws the same in whatever batch it is."""


def dropout(x: Array, rate: float, key: Keys | None) -> Array:
    """Zeroes elements of `x` with probability `rate` and scales the others by 1 / (1 - rate); without a key, returns
    `x`."""
    if key is None or rate == 0:
        return x
    keep = _bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def survivors(count: int, rate: float, key: Keys | None) -> Float[Array, " count"]:
    """Stochastic depth: 0 with probability `rate`, else 1 / (1 - rate); all ones without a key."""
    if key is None or rate == 0:
        return jnp.ones(count)
    return _bernoulli(key, 1 - rate, (count,)).astype(jnp.float32) / (1 - rate)


def _bernoulli(key: Keys, probability: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """True with a probability. Of a key for each image, the first axis has the rows of one image after the other."""
    if not _of_images(key):
        return jax.random.bernoulli(key, probability, shape)
    of_image = (shape[0] // len(key), *shape[1:])
    return jax.vmap(lambda each: jax.random.bernoulli(each, probability, of_image))(key).reshape(shape)


def drop_path(x: Array, rate: float, key: Keys | None) -> Array:
    """Stochastic depth.

    Drops a residual branch for whole rows of the first axis (an image, or a patch in the inner transformer).
    """
    if key is None or rate == 0:
        return x
    return x * survivors(x.shape[0], rate, key).astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def survivors_of_branches(count: int, rate: float, key: Keys | None) -> Float[Array, "2 count"]:
    """`survivors` of the two branches of a transformer layer, drawn as `TransformerLayer` draws them."""
    _, attn_key, _, mlp_key = split_key(key, 4)
    return jnp.stack([survivors(count, rate, each) for each in (attn_key, mlp_key)])


def split_key(key: Keys | None, count: int) -> list[Keys | None]:
    """`count` independent keys (of each image), or as many None when there is no randomness to pass on."""
    if key is None:
        return [None] * count
    split = functools.partial(jax.random.split, num=count)
    return list(jax.vmap(split, out_axes=1)(key) if _of_images(key) else split(key))


def _of_images(key: Keys) -> bool:
    return key.ndim == 1 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def gelu(x: Array) -> Array:
    """The exact GELU, x times the normal distribution's cumulative function (equation 2)."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))
