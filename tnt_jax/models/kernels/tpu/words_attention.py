"""Attention over the words of a sentence on a TPU: arithmetic between registers, each of which holds one channel of one
word of a tile's 1,024 sentences.

Where a TPU computes with registers of bfloat16, which hold twice as much, a register holds two words: of queries two
different ones, of keys and values the same one twice. All that follows is then the same, for two queries at once.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tnt_jax.models.kernels.tpu.folded_layer import LN_2
from tnt_jax.models.kernels.tpu.tile import LANES, SUBLANES, TILE, Sizes, total

SPAN = 2 * LANES  # sentences of a matrix product
SPANS = range(TILE // SPAN)
QUERIES = 2  # registers of queries at a time: keys and values are read, and their gradients written, less often


class Registers:
    """Registers of one channel of one word of all sentences, in VMEM; packed, of two words in bfloat16."""

    def __init__(self, ref, words: int):
        self.ref, self.words, self.pitch = ref, words, _pitch(words)
        self.packed = ref.dtype == jnp.uint32

    def __getitem__(self, at: tuple[int, Array | int]) -> Array:
        value = self.ref[self._rows(*at), :]
        return pltpu.bitcast(value, jnp.bfloat16) if self.packed else value

    def __setitem__(self, at: tuple[int, Array | int], value: Array) -> None:
        self.ref[self._rows(*at), :] = pltpu.bitcast(value, jnp.uint32) if self.packed else value

    def spread(self, first: int, word: Array, span: int, values: Float[Array, "channels span"]) -> None:
        """Writes the channels of a word from this one on, for a span of sentences."""
        for half, group in enumerate(_groups(span)):
            part = values[:, half * LANES : (half + 1) * LANES]
            self.ref[self._strided(first, values.shape[0], word, group), :] = part

    def gather(self, first: int, count: int, word: Array, span: int) -> Float[Array, "channels span"]:
        """Reads what `spread` writes."""
        return jnp.concatenate([self.ref[self._strided(first, count, word, group), :] for group in _groups(span)], 1)

    def clear(self, word: Array) -> None:
        for channel in range(self.ref.shape[0] // self.pitch):
            self.ref[self._rows(channel, word), :] = jnp.zeros((SUBLANES, LANES), self.ref.dtype)

    def _rows(self, channel: int, word: Array | int) -> pl.Slice:
        return pl.ds(channel * self.pitch + word * SUBLANES, SUBLANES)

    def _strided(self, first: int, count: int, word: Array, group: int) -> pl.Slice:
        return pl.ds(first * self.pitch + word * SUBLANES + group, count, stride=self.pitch)


def _pitch(words: int) -> int:
    """Rows from one channel to the next; odd, for which inner_block.py has the reason."""
    return words * SUBLANES + 1


def _groups(span: int) -> range:
    """The groups of 128 sentences of a span."""
    return range(span * (SPAN // LANES), (span + 1) * (SPAN // LANES))


def registers(channels: int, words: int) -> tuple[int, int]:
    """The shape of an array for `Registers`."""
    return channels * _pitch(words), LANES


def total_in_float32(terms: list[Array]) -> Array:
    """The sum; of terms in bfloat16 the first additions are too, but the last ones, of the largest sums, are not."""
    quarter = max(1, len(terms) // 4)
    sums = [total(terms[start : start + quarter]) for start in range(0, len(terms), quarter)]
    return total([each.astype(jnp.float32) for each in sums])


class Head:
    """Registers of one head of attention: [channel] of the current word, (channel, word) of the others."""

    def __init__(self, sizes: Sizes, head: int, key_value: Registers):
        self.sizes, self.first, self.key_value = sizes, head * sizes.head_dim, key_value

    def current(self, registers: Registers, word: Array) -> list[Array]:
        """This head's channels of a word in an array that has as many channels as the layer."""
        return [registers[self.first + d, word] for d in range(self.sizes.head_dim)]

    def write(self, registers: Registers, word: Array, values: list[Array]) -> None:
        for d, value in enumerate(values):
            registers[self.first + d, word] = value

    def key(self, d: int, word: int) -> Array:
        return self.key_value[self.first + d, word]

    def value(self, d: int, word: int) -> Array:
        return self.key_value[self.sizes.channels + self.first + d, word]

    def weights(self, query: list[Array]) -> tuple[list[Array], Array]:
        """Exponentials of the scores against every word, and one over their sum."""
        words = range(self.sizes.words)
        scores = [total([q * self.key(d, j) for d, q in enumerate(query)]) for j in words]
        highest = functools.reduce(jnp.maximum, scores)
        exponentials = [jnp.exp2(score - highest) for score in scores]
        return exponentials, 1 / total_in_float32(exponentials)


def for_all_queries(sizes: Sizes, query: Registers, key_value: Registers, visit: Callable) -> None:
    """Calls `visit` with each head and a few registers of queries at a time."""
    at_once = math.gcd(query.words, QUERIES)
    for index in range(sizes.heads):
        head = Head(sizes, index, key_value)

        def some(turn: Array, _, head: Head = head) -> int:
            visit(head, [at_once * turn + i for i in range(at_once)])
            return 0

        lax.fori_loop(0, query.words // at_once, some, 0)


def attend(sizes: Sizes, query: Registers, key_value: Registers) -> None:
    """Attention of all words; what a query finds takes its place."""

    def visit(head: Head, words: list[Array]) -> None:
        for word in words:
            exponentials, scale = head.weights(head.current(query, word))
            mixed = [total([e * head.value(d, j) for j, e in enumerate(exponentials)]) for d in range(sizes.head_dim)]
            head.write(query, word, [value * scale.astype(value.dtype) for value in mixed])

    for_all_queries(sizes, query, key_value, visit)


def attention_gradients(
    sizes: Sizes, query: Registers, key_value: Registers, dattended: Registers, dkey_value: Registers
) -> None:
    """Gradients of attention; that of a query takes its place, those of keys and values are added."""

    def visit(head: Head, words: list[Array]) -> None:
        parts = [gradient_of_query(sizes, head, query, dattended, word) for word in words]
        for j in range(sizes.words):
            for d in range(sizes.head_dim):
                dkey = total([dscores[j] * q[d] for q, _, dscores, _ in parts])
                dvalue = total([exponentials[j] * dout[d] for _, exponentials, _, dout in parts])
                dkey_value[head.first + d, j] += dkey
                dkey_value[sizes.channels + head.first + d, j] += dvalue

    for_all_queries(sizes, query, key_value, visit)


def gradient_of_query(sizes: Sizes, head: Head, query: Registers, dattended: Registers, word: Array) -> tuple:
    """Writes the gradient of a query into its place.

    Returns: of the query its channels, exponentials, the gradients of its scores, and that of what it found, scaled.
    """
    words, dims = range(sizes.words), range(sizes.head_dim)
    q, dout = head.current(query, word), head.current(dattended, word)
    exponentials, scale = head.weights(q)
    # All that is not divided by the sum of the exponentials is divided here. Scores are exponents of 2, which makes
    # their gradients LN_2 times as large; that of v will be divided by it.
    once = (scale * LN_2).astype(dout[0].dtype)
    dout = [value * once for value in dout]
    dweights = [total([dout[d] * head.value(d, j) for d in dims]) for j in words]
    along = total_in_float32([e * dw for e, dw in zip(exponentials, dweights, strict=True)]) * scale
    along = along.astype(dweights[0].dtype)
    dscores = [e * (dw - along) for e, dw in zip(exponentials, dweights, strict=True)]
    head.write(query, word, [total([dscores[j] * head.key(d, j) for j in words]) for d in dims])
    return q, exponentials, dscores, dout
