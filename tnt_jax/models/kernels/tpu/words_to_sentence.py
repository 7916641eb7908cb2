"""Words to sentence as two Pallas kernels for TPUs: norm, linear map, norm (equation 8), forward and backward.

The words come as the inner block's kernel leaves them, a column for each sentence, and a norm of them is one pass down
a column; where XLA would read and write the words five times, they are read once. The result is transposed in
registers, to a row for each sentence, as the outer transformer has them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tnt_jax.models.kernels.tpu.tile import (
    LANES,
    TILE,
    PerSentence,
    dot,
    is_sentence,
    normalise_columns,
    normalise_columns_gradient,
    over_tiles,
    start_sums,
    with_matrices_in,
)

GROUP = 2 * LANES  # sentences at a time, for which the matrix product is prepared once


class Projection(NamedTuple):
    """Parameters as columns and a matrix that multiplies from the left.

    In the backward kernel the same names hold their gradients.
    """

    norm1_scale: Array  # (words * channels, 1)
    norm1_bias: Array
    proj: Array  # (outer, words * channels)
    proj_bias: Array  # (outer, 1)
    norm2_scale: Array
    norm2_bias: Array


def covers_projection(rows: int, outer: int) -> bool:
    """Whether the kernels can run such a projection: the result fills whole registers, transposed or not."""
    return rows % LANES == 0 and outer % LANES == 0


def to_result(layer: Projection, epsilon: float, x: Array) -> tuple:
    """From words to what the second norm has made, for a group of sentences.

    Returns: (normed, scale) of the first norm, its result, (normed, scale) of the second one.
    """
    part1 = normalise_columns(x, epsilon)
    h = (part1[0] * layer.norm1_scale[...] + layer.norm1_bias[...]).astype(layer.proj.dtype)
    return part1, h, normalise_columns(dot(layer.proj[...], h) + layer.proj_bias[...], epsilon)


def partial_sums(x: Array) -> Array:
    """128 sums along the lanes."""
    return sum(x[:, start : start + LANES] for start in range(0, GROUP, LANES))


def forward_kernel(epsilon: float, x_ref, *refs) -> None:
    layer, y_ref = Projection(*refs[:-1]), refs[-1]
    for start in range(0, TILE, GROUP):
        lanes = pl.ds(start, GROUP)
        *_, (normed, _) = to_result(layer, epsilon, x_ref[:, lanes].astype(jnp.float32))
        y_ref[lanes, :] = (normed * layer.norm2_scale[...] + layer.norm2_bias[...]).T.astype(y_ref.dtype)


def backward_kernel(epsilon: float, sentences: int, x_ref, passed_ref, dy_ref, *refs) -> None:
    """Gradients of the words and, summed over the tiles, of the parameters; those of vectors with 128 partial sums.

    `passed_ref` is the gradient that reaches the words by other ways, and is added.
    """
    count = len(Projection._fields)
    layer, dx_ref, gradients = Projection(*refs[:count]), refs[count], Projection(*refs[count + 1 :])
    start_sums(gradients)
    columns, rows = is_sentence(sentences), is_sentence(sentences, 0)
    for start in range(0, TILE, GROUP):
        lanes, end = pl.ds(start, GROUP), start + GROUP
        x = jnp.where(columns[:, start:end], x_ref[:, lanes].astype(jnp.float32), 0)
        dy = jnp.where(rows[start:end], dy_ref[lanes, :].astype(jnp.float32), 0).T
        (normed1, scale1), h, (normed2, scale2) = to_result(layer, epsilon, x)
        gradients.norm2_bias[...] += partial_sums(dy)
        gradients.norm2_scale[...] += partial_sums(dy * normed2)
        dz = normalise_columns_gradient(dy * layer.norm2_scale[...], normed2, scale2)
        gradients.proj_bias[...] += partial_sums(dz)
        dz = dz.astype(layer.proj.dtype)
        gradients.proj[...] += dot(dz, h, (1, 1))
        dh = dot(layer.proj[...], dz, (0, 0))
        gradients.norm1_bias[...] += partial_sums(dh)
        gradients.norm1_scale[...] += partial_sums(dh * normed1)
        dx = normalise_columns_gradient(dh * layer.norm1_scale[...], normed1, scale1)
        dx_ref[:, lanes] = (passed_ref[:, lanes].astype(jnp.float32) + dx).astype(dx_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def words_to_sentence(
    epsilon: float, interpret: bool, words: Float[Array, "flat sentences"], layer: Projection
) -> tuple[Float[Array, "flat sentences"], Float[Array, "sentences outer"]]:
    """The words as they were given, and those of every sentence as one vector, in the dtype of the words.

    What goes on with the words that are returned has its gradient added in the backward kernel, not in a pass of its
    own.

    `interpret` runs the kernels step by step on any platform, for tests.
    """
    return words, _sentences(epsilon, interpret, words, layer)


# Jitted, as in inner_block.py.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _sentences(epsilon: float, interpret: bool, words, layer: Projection) -> Array:
    _, sentences = words.shape
    (out,) = over_tiles(
        "words_to_sentence_forward",
        functools.partial(forward_kernel, epsilon),
        [PerSentence(words)],
        with_matrices_in(words.dtype, layer),
        [PerSentence(jax.ShapeDtypeStruct((sentences, layer.proj.shape[0]), words.dtype), axis=0)],
        flops=2 * sentences * layer.proj.size,
        interpret=interpret,
    )
    return out


def _forward(epsilon: float, interpret: bool, words, layer: Projection):
    return words_to_sentence(epsilon, interpret, words, layer), (words, layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(epsilon: float, interpret: bool, saved, gradients):
    (words, layer), (passed, gradient) = saved, gradients
    _, sentences = words.shape
    dwords, *dlayer = over_tiles(
        "words_to_sentence_backward",
        functools.partial(backward_kernel, epsilon, sentences),
        [PerSentence(words), PerSentence(passed), PerSentence(gradient, axis=0)],
        with_matrices_in(words.dtype, layer),
        [PerSentence(jax.ShapeDtypeStruct(words.shape, words.dtype))],
        sums=True,
        flops=6 * sentences * layer.proj.size,
        interpret=interpret,
    )
    return dwords, Projection(*dlayer)


words_to_sentence.defvjp(_forward, _backward)
