"""The linear maps of an inner transformer layer as its TPU kernels multiply by them: with all that can be folded in.

The kernels are bound by arithmetic between registers, and a matrix unit has room: a word takes 24 of its 128 or 256
rows. So the scale and the bias of a norm become part of the linear map that follows, biases are columns that meet
inputs of ones, constants are multiplied in, and a product takes two words, with matrices that are diagonal in them.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_jax.models.kernels.parameters import LayerParameters
from tnt_jax.models.kernels.tpu.tile import SUBLANES

ONES = 16  # rows of ones below what a matrix is multiplied by: a whole register in bfloat16
LN_2 = math.log(2)


class Folded(NamedTuple):
    """Matrices (outputs, inputs + 1) in float32, whose last column is the bias.

    They take what is normalised and no more, scores are exponents of 2, and `fc1` gives what `scaled_gelu` takes.
    """

    qkv: Array
    proj: Array
    fc1: Array
    fc2: Array


class Forward(NamedTuple):
    """The factors of the forward kernel, in the dtype of products; two words at a time but for `fc2`."""

    sums: Array  # (16, 2 * channels): the sum of a word's channels, eight times
    qkv: Array
    proj: Array  # with 16 rows more, for the means of its outputs, each eight times
    fc1: Array
    fc2: Array


class Backward(NamedTuple):
    """The factors of the backward kernel beside the matrices of `Forward`.

    Gradients of what a norm has made are without their mean, which a norm's gradient takes from them.
    """

    fc2: Array  # (2 * hidden, 2 * channels)
    fc1: Array  # (channels, hidden)
    proj: Array  # (2 * channels, 2 * channels)
    qkv: Array  # (channels, 3 * channels), of a gradient of v that is LN_2 times too large; packed, of two words


def fold(layer: LayerParameters, head_dim: int, gelu_scale: float) -> Folded:
    """The layer with everything folded into its matrices; differentiable."""
    channels = layer.proj.shape[0]

    def after_norm(matrix: Array, scale: Array, bias: Array) -> Float[Array, "outputs inputs_and_bias"]:
        return jnp.concatenate([matrix * scale.T, (matrix * bias.T).sum(1, keepdims=True)], 1)

    qkv = after_norm(layer.qkv, layer.norm1_scale, layer.norm1_bias)
    fc1 = after_norm(layer.fc1, layer.norm2_scale, layer.norm2_bias)
    fc1 += jnp.pad(layer.fc1_bias, ((0, 0), (channels, 0)))
    of_query = jnp.where(jnp.arange(3 * channels) < channels, head_dim**-0.5 / LN_2, 1)
    return Folded(
        qkv * of_query[:, None],
        jnp.concatenate([layer.proj, layer.proj_bias], 1),
        fc1 * gelu_scale,
        jnp.concatenate([layer.fc2 * (0.5 / gelu_scale), layer.fc2_bias], 1),
    )


def forward_matrices(folded: Folded, dtype: DTypeLike, *, packed: bool) -> Forward:
    """`packed`: q comes with a channel of both words before the next one, k and v with each channel twice, and what
    attention found comes as q does."""
    channels = folded.proj.shape[0]
    qkv = [_of_two_words(part, dtype) for part in jnp.split(folded.qkv, 3)]
    if packed:
        qkv = [qkv[0][_interleaved(channels)], *(jnp.repeat(part, 2, 0) for part in qkv[1:])]
    mean = jnp.broadcast_to(folded.proj.mean(0, keepdims=True), (SUBLANES, channels + 1))
    proj = jnp.concatenate([_of_two_words(each, dtype) for each in (folded.proj, mean)])
    if packed:
        proj = jnp.concatenate([proj[:, _interleaved(channels)], proj[:, 2 * channels :]], 1)
    sums = jnp.repeat(jnp.eye(2), SUBLANES, 0)
    return Forward(
        jnp.repeat(sums, channels, 1).astype(dtype),
        jnp.concatenate(qkv),
        proj,
        _of_two_words(folded.fc1, dtype),
        jnp.concatenate([folded.fc2[:, :-1].astype(dtype), _bias_columns(folded.fc2[:, -1:], dtype)], 1),
    )


def backward_matrices(folded: Folded, dtype: DTypeLike, *, packed: bool) -> Backward:
    """`packed`: the gradient of what attention found has a channel of both words before the next one, and a product
    with `qkv` takes two words, as `dqkv_of_pair` gives them."""
    fc2, fc1, proj, qkv = (folded[index][:, :-1].T for index in (3, 2, 1, 0))
    channels = proj.shape[0]
    of_value = jnp.where(jnp.arange(3 * channels) < 2 * channels, 1, 1 / LN_2)
    qkv = (qkv - qkv.mean(0)) * of_value
    proj = jnp.kron(jnp.eye(2), proj)
    if packed:
        proj = proj[_interleaved(channels)]
        of_query = jnp.kron(jnp.eye(2), qkv[:, :channels])[:, _interleaved(channels)]
        qkv = jnp.concatenate([of_query, jnp.kron(jnp.eye(2), jnp.repeat(qkv[:, channels:], 2, 1))], 1)
    matrices = jnp.kron(jnp.eye(2), fc2), fc1 - fc1.mean(0), proj, qkv
    return Backward(*(matrix.astype(dtype) for matrix in matrices))


def folded_gradient(gradient: Folded, *, packed: bool) -> Folded:
    """The gradient of the folded matrices from what the backward kernel adds up: for `fc2` as the matrix is, for the
    others (inputs of two words and ones, outputs of two words); `packed` as above."""
    if packed:
        count = gradient.proj.shape[1]
        of_words = gradient.proj[:count].reshape(-1, 2, count).swapaxes(0, 1).reshape(count, count)
        qkv, inputs = gradient.qkv, gradient.qkv.shape[0]
        of_query = qkv[:, :count].reshape(inputs, -1, 2).swapaxes(1, 2)
        of_others = qkv[:, count:].reshape(inputs, 2, -1, 2).sum(3)
        qkv = jnp.concatenate([of_query, of_others], 2).reshape(inputs, -1)
        gradient = gradient._replace(qkv=qkv, proj=jnp.concatenate([of_words, gradient.proj[count:]]))
    qkv, proj, fc1 = (_of_one_word(each) for each in gradient[:3])
    of_rows = jnp.where(jnp.arange(qkv.shape[0]) < 2 * proj.shape[0], 1, 1 / LN_2)
    return Folded(qkv * of_rows[:, None], proj, fc1, gradient.fc2[:, : 1 - ONES])


def _interleaved(channels: int) -> Array:
    """The columns of two words' channels, a channel of both before the next one."""
    return jnp.arange(2 * channels).reshape(2, channels).T.reshape(-1)


def _of_two_words(matrix: Float[Array, "outputs inputs_and_bias"], dtype: DTypeLike) -> Array:
    """Diagonal in two words, the bias for inputs of ones."""
    blocks = jnp.kron(jnp.eye(2), matrix[:, :-1]).astype(dtype)
    return jnp.concatenate([blocks, _bias_columns(jnp.tile(matrix[:, -1:], (2, 1)), dtype)], 1)


def _bias_columns(bias: Float[Array, "outputs 1"], dtype: DTypeLike) -> Float[Array, "outputs ones"]:
    """A column of its own for the rest of rounding."""
    # Compilers leave this rounding in, where they drop conversions there and back.
    format = jnp.finfo(dtype)
    rounded = lax.reduce_precision(bias, format.nexp, format.nmant)
    columns = jnp.concatenate([rounded, bias - rounded], 1).astype(dtype)
    return jnp.pad(columns, ((0, 0), (0, ONES - 2)))


def _of_one_word(gradient: Float[Array, "two_inputs_and_ones two_outputs"]) -> Float[Array, "outputs inputs_and_bias"]:
    inputs, outputs = (gradient.shape[0] - ONES) // 2, gradient.shape[1] // 2
    words = [gradient[word * inputs : (word + 1) * inputs, word * outputs : (word + 1) * outputs] for word in (0, 1)]
    bias = gradient[2 * inputs, :outputs] + gradient[2 * inputs, outputs:]
    return jnp.concatenate([sum(words), bias[None]]).T
