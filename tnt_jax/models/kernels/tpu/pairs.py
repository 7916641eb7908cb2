"""Two words at a time: norms of them, whose sums are matrix products, and chains of stages that run side by side."""

import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_jax.models.kernels.tpu.folded_layer import ONES
from tnt_jax.models.kernels.tpu.tile import SUBLANES, Sizes, dot
from tnt_jax.models.kernels.tpu.words_attention import SPAN, SPANS

# Pairs of words whose chains run side by side: more hide waiting better, fewer leave registers free. Chosen by the
# schedules of libtpu 0.0.42.
PAIRS, PAIRS_OF_PROJECTION = 2, 4
Stages = Iterator[None]  # of a generator that returns something


def lanes_of(span: int) -> pl.Slice:
    return pl.ds(span * SPAN, SPAN)


def rows_of_pair(sizes: Sizes, pair: Array) -> pl.Slice:
    """The channels of two words in a matrix of all words: whole registers in bfloat16 too."""
    count = 2 * sizes.channels
    return pl.ds(pl.multiple_of(pair * count, count), count)


def per_word(operation: Callable, x: Float[Array, "channels span"], of_words: Float[Array, "16 span"]) -> Array:
    """An operation of the channels of two words with what there is for each word, eight times."""
    words = of_words.reshape(2, 1, SUBLANES, SPAN)
    return operation(x.reshape(2, -1, SUBLANES, SPAN), words).reshape(x.shape)


class Norm:
    """Norms of two words; their sums over channels are matrix products."""

    def __init__(self, sizes: Sizes, sums_ref):
        self.sizes, self.sums_ref = sizes, sums_ref

    def mean(self, x: Float[Array, "channels span"]) -> Float[Array, "16 span"]:
        return dot(self.sums_ref[...], x.astype(self.sizes.dtype)) * (1 / self.sizes.channels)

    def __call__(self, x: Array, mean: Array) -> Stages:
        """Returns: channels with mean 0 and variance 1, and what they were multiplied by."""
        centred = per_word(jnp.subtract, x, mean)
        variance = self.mean(centred * centred)
        yield
        scale = lax.rsqrt(variance + self.sizes.epsilon)
        return per_word(jnp.multiply, centred, scale), scale

    def gradient(self, gradient: Array, normed: Array, scale: Array) -> Stages:
        """Returns: the gradient of what was given, from that of the result less its mean."""
        yield
        along = self.mean(gradient * normed)
        yield
        return per_word(jnp.multiply, gradient - per_word(jnp.multiply, normed, along), scale)


def with_ones(x: Float[Array, "rows span"], dtype: DTypeLike) -> Float[Array, "rows_and_ones span"]:
    """For a product: rows of ones below meet the biases of a matrix."""
    return jnp.concatenate([x, jnp.ones((ONES, x.shape[1]), x.dtype)]).astype(dtype)


def for_pairs(sizes: Sizes, chain: Callable, at_once: int = PAIRS) -> None:
    """Runs a chain of stages for each pair of words and each span, each stage for many of them before the next one.

    A compiler schedules instructions nearly as they come, and the stages of one chain wait for each other.
    """
    pairs = math.gcd(sizes.words // 2, at_once)

    def visit(index: Array, _) -> int:
        chains = [chain(pairs * index + pair, span) for pair in range(pairs) for span in SPANS]
        # A generator that has ended gives "end".
        while [next(each, "end") for each in chains].count("end") < len(chains):
            pass
        return 0

    lax.fori_loop(0, sizes.words // 2 // pairs, visit, 0)
