"""Words to sentence as two Pallas kernels for TPUs: norm, linear map, norm (equation 8), forward and backward.

The words come as the inner block's kernel leaves them, a column for each sentence, and a norm of them is one pass down
a column; where XLA would read and write the words five times, they are read once. The result is transposed in
registers, to a row for each sentence, as the outer transformer has them.

Sums over a column are matrix products with ones, and what is linear is folded into the linear map: the scale and bias
of the norm before it, and that the norm after it subtracts the mean.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_jax.models.kernels.tpu.tile import (
    LANES,
    SUBLANES,
    TILE,
    Machine,
    PerSentence,
    dot,
    is_sentence,
    over_tiles,
)

GROUP = 2 * LANES  # sentences at a time, for which the matrix product is prepared once


class Projection(NamedTuple):
    """Parameters as columns and a matrix that multiplies from the left."""

    norm1_scale: Array  # (words * channels, 1)
    norm1_bias: Array
    proj: Array  # (outer, words * channels)
    proj_bias: Array  # (outer, 1)
    norm2_scale: Array
    norm2_bias: Array


class FoldedProjection(NamedTuple):
    """A linear map of what is normalised and no more, whose results have mean 0; and what the second norm has."""

    proj: Array
    proj_bias: Array
    norm2_scale: Array
    norm2_bias: Array


def covers_projection(rows: int, outer: int) -> bool:
    """True if the kernels can run such a projection: the result fills whole registers, transposed or not."""
    return rows % LANES == 0 and outer % LANES == 0


def fold_projection(layer: Projection) -> FoldedProjection:
    """The first norm's scale and bias, and the second one's mean, as part of the linear map; differentiable."""
    proj = layer.proj * layer.norm1_scale.T
    bias = layer.proj_bias + (layer.proj * layer.norm1_bias.T).sum(1, keepdims=True)
    return FoldedProjection(proj - proj.mean(0), bias - bias.mean(0), layer.norm2_scale, layer.norm2_bias)


def column_means(x: Float[Array, "rows group"], dtype: DTypeLike) -> Float[Array, "8 group"]:
    """Eight times."""
    return dot(jnp.ones((SUBLANES, x.shape[0]), dtype), x.astype(dtype)) * (1 / x.shape[0])


def per_column(operation, x: Float[Array, "rows group"], of_columns: Float[Array, "8 group"]) -> Array:
    """An operation of columns with what there is for each of them, eight times."""
    return operation(x.reshape(-1, SUBLANES, x.shape[1]), of_columns).reshape(x.shape)


def scaled(x: Float[Array, "rows group"], epsilon: float, dtype: DTypeLike) -> tuple[Array, Array]:
    """Columns of mean 0 with variance 1, and what they were multiplied by."""
    scale = lax.rsqrt(column_means(x * x, dtype) + epsilon)
    return per_column(jnp.multiply, x, scale), scale


def scaled_gradient(gradient: Array, normed: Array, scale: Array, dtype: DTypeLike) -> Array:
    """Gradient of what `scaled` was given, but for its mean."""
    along = column_means(gradient * normed, dtype)
    return per_column(jnp.multiply, gradient - per_column(jnp.multiply, normed, along), scale)


def across(column: Float[Array, "rows 128"]) -> Float[Array, "rows group"]:
    return jnp.concatenate([column] * (GROUP // LANES), 1)


def to_result(proj_ref, bias_ref, epsilon: float, x: Float[Array, "rows group"]) -> tuple:
    """From words to what the second norm has made, for a group of sentences.

    Returns: (normed, scale) of the first norm, its result for a product, (normed, scale) of the second one.
    """
    dtype = proj_ref.dtype
    part1 = scaled(per_column(jnp.subtract, x.astype(jnp.float32), column_means(x, dtype)), epsilon, dtype)
    h = part1[0].astype(dtype)
    return part1, h, scaled(dot(proj_ref[...], h) + across(bias_ref[...]), epsilon, dtype)


def partial_sums(x: Array) -> Array:
    """128 sums along the lanes."""
    return sum(x[:, start : start + LANES] for start in range(0, GROUP, LANES))


def forward_kernel(epsilon: float, first: Array, x_ref, proj_ref, bias_ref, scale2_ref, bias2_ref, y_ref) -> None:
    for start in range(0, TILE, GROUP):
        lanes = pl.ds(start, GROUP)
        *_, (normed, _) = to_result(proj_ref, bias_ref, epsilon, x_ref[:, lanes])
        y_ref[lanes, :] = (normed.T * scale2_ref[...] + bias2_ref[...]).astype(y_ref.dtype)


def backward_kernel(
    epsilon: float, sentences: int, first: Array,
    x_ref, passed_ref, dy_ref, proj_ref, transposed_ref, bias_ref, scale2_ref, dx_ref, *gradients,
) -> None:  # fmt: skip
    """Gradients of the words and, summed over the tiles, of `FoldedProjection`; those of vectors with 128 partial sums.

    `passed_ref` is the gradient that reaches the words by other ways, and is added.
    """
    gradients, dtype = FoldedProjection(*gradients), proj_ref.dtype

    @pl.when(first + TILE > sentences)
    def _():
        for ref, axis in ((x_ref, 1), (dy_ref, 0)):
            there = is_sentence(first, sentences, axis)
            ref[...] = jnp.where(there, ref[...].astype(jnp.float32), 0).astype(ref.dtype)

    for start in range(0, TILE, GROUP):
        lanes = pl.ds(start, GROUP)
        dy = dy_ref[lanes, :].astype(jnp.float32).T
        (normed1, scale1), h, (normed2, scale2) = to_result(proj_ref, bias_ref, epsilon, x_ref[:, lanes])
        gradients.norm2_bias[...] += partial_sums(dy)
        gradients.norm2_scale[...] += partial_sums(dy * normed2)
        dz = scaled_gradient(dy * across(scale2_ref[...]), normed2, scale2, dtype)
        gradients.proj_bias[...] += partial_sums(dz)
        dz = dz.astype(dtype)
        gradients.proj[...] += dot(dz, h, (1, 1))
        dx = scaled_gradient(dot(transposed_ref[...], dz), normed1, scale1, dtype)
        dx_ref[:, lanes] = (passed_ref[:, lanes].astype(jnp.float32) + dx).astype(dx_ref.dtype)


def words_to_sentence(
    epsilon: float, machine: Machine, words: Float[Array, "flat sentences"], layer: Projection
) -> tuple[Float[Array, "flat sentences"], Float[Array, "sentences outer"]]:
    """The words as they were given, and those of every sentence as one vector, in the dtype of the words.

    What goes on with the words that are returned has its gradient added in the backward kernel, not in a pass of its
    own.
    """
    return _words_to_sentence(epsilon, machine, words, fold_projection(layer))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _words_to_sentence(epsilon: float, machine: Machine, words, layer: FoldedProjection) -> tuple[Array, Array]:
    return words, _sentences(epsilon, machine, words, layer)


def in_every_lane(column: Float[Array, "rows 1"]) -> Float[Array, "rows 128"]:
    """Else a kernel spreads a column over the lanes each time that it is used."""
    return jnp.broadcast_to(column, (column.shape[0], LANES))


# Jitted, as in inner_block.py.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _sentences(epsilon: float, machine: Machine, words, layer: FoldedProjection) -> Array:
    _, sentences = words.shape
    (out,) = over_tiles(
        "words_to_sentence_forward",
        functools.partial(forward_kernel, epsilon),
        [PerSentence(words)],
        [layer.proj.astype(words.dtype), in_every_lane(layer.proj_bias), layer.norm2_scale.T, layer.norm2_bias.T],
        [PerSentence(jax.ShapeDtypeStruct((sentences, layer.proj.shape[0]), words.dtype), axis=0)],
        flops=2 * sentences * layer.proj.size,
        machine=machine,
    )
    return out


def _forward(epsilon: float, machine: Machine, words, layer: FoldedProjection):
    return _words_to_sentence(epsilon, machine, words, layer), (words, layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(epsilon: float, machine: Machine, saved, gradients):
    (words, layer), (passed, gradient) = saved, gradients
    _, sentences = words.shape
    # What the first norm's gradient subtracts, a column's mean, is subtracted in the matrix.
    transposed = (layer.proj - layer.proj.mean(1, keepdims=True)).T
    matrices = [matrix.astype(words.dtype) for matrix in (layer.proj, transposed)]
    of_vector = (layer.proj.shape[0], LANES)
    dwords, dproj, *dvectors = over_tiles(
        "words_to_sentence_backward",
        functools.partial(backward_kernel, epsilon, sentences),
        [PerSentence(words), PerSentence(passed), PerSentence(gradient, axis=0)],
        [*matrices, in_every_lane(layer.proj_bias), in_every_lane(layer.norm2_scale)],
        [PerSentence(jax.ShapeDtypeStruct(words.shape, words.dtype))],
        sums=FoldedProjection(layer.proj.shape, of_vector, of_vector, of_vector),
        flops=6 * sentences * layer.proj.size,
        machine=machine,
    )
    return dwords, FoldedProjection(dproj, *(vector.sum(1, keepdims=True) for vector in dvectors))


_words_to_sentence.defvjp(_forward, _backward)
