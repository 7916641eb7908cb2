"""The parameters of an inner layer as the CUDA kernels take them, and their gradients back from the kernels' sums.

Norms' scales and biases, the scale of the softmax and log2(e) are folded into the matrices, a row is added for biases
and each head is padded to 8 or 16 channels (inner_layer.h says why). JAX differentiates the folding.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tnt_jax.models.kernels.gpu.sizes import LayerSizes
from tnt_jax.models.kernels.parameters import LayerParameters

LOG2E = math.log2(math.e)


class PaddedMatrices(NamedTuple):
    """Matrices (inputs, outputs) in float32; a kernel's gradient has the same names."""

    qkv: Array  # normed to (heads, q k v, padded_dim)
    proj: Array  # (heads, padded_dim) to channels
    fc1: Array  # normed to hidden
    fc2: Array  # hidden to channels; half of it, since the kernels' GELU is twice GELU
    bias: Array  # of fc2, padded


def padded_matrices(sizes: LayerSizes, p: LayerParameters) -> PaddedMatrices:
    """Parameters as the modules hold them, in float32."""
    channels = sizes.channels

    def with_bias_row(matrix: Array, bias: Array) -> Array:
        rows = sizes.normed - channels - 1
        return jnp.concatenate([matrix, bias[None], jnp.zeros((rows, matrix.shape[1]), matrix.dtype)])

    def times_matrix(vector: Array, matrix: Array) -> Array:
        return jnp.matmul(vector, matrix, precision=jax.lax.Precision.HIGHEST)

    folded, offset = p.norm1_scale[:, None] * p.qkv, times_matrix(p.norm1_bias, p.qkv)
    q, k, v = (
        with_bias_row(*(_pad_heads(sizes, each[..., start : start + channels]) for each in (folded, offset)))
        for start in range(0, 3 * channels, channels)
    )
    v = v.at[channels, sizes.dim :: sizes.padded_dim].set(1.0)  # the product with it sums up the softmax
    by_head = [each.reshape(sizes.normed, sizes.heads, -1) for each in (q * (sizes.dim**-0.5 * LOG2E), k, v)]
    return PaddedMatrices(
        qkv=jnp.stack(by_head, axis=2).reshape(sizes.normed, -1),
        proj=_pad_heads(sizes, p.proj.T).T.at[sizes.dim].set(p.proj_bias),
        fc1=with_bias_row(p.norm2_scale[:, None] * p.fc1, p.fc1_bias + times_matrix(p.norm2_bias, p.fc1)),
        fc2=p.fc2 / 2,
        bias=jnp.pad(p.fc2_bias, (0, sizes.padded - channels)),
    )


def _pad_heads(sizes: LayerSizes, matrix: Float[Array, "*rows channels"]) -> Float[Array, "*rows padded"]:
    heads = matrix.reshape(*matrix.shape[:-1], sizes.heads, sizes.dim)
    padding = [(0, 0)] * (heads.ndim - 1) + [(0, sizes.padded_dim - sizes.dim)]
    return jnp.pad(heads, padding).reshape(*matrix.shape[:-1], -1)


def tiles(matrix: Float[Array, "inputs outputs"]) -> Float[Array, "tiles 32 8"]:
    """Tiles of 32 x 8 as mma.sync wants its right operand, row after row: of each lane 8 numbers."""
    matrix = jnp.pad(matrix, [(0, -matrix.shape[0] % 32), (0, -matrix.shape[1] % 8)])
    rows, columns = matrix.shape[0] // 32, matrix.shape[1] // 8
    # Inputs are (16s, 8s, twos, ones) of a tile; a lane has the output lane // 4 and the twos lane % 4.
    parts = matrix.reshape(rows, 2, 2, 4, 2, columns, 8).transpose(0, 5, 6, 3, 1, 2, 4)
    return parts.reshape(rows * columns, 32, 8)


def forward_tiles(m: PaddedMatrices) -> Float[Array, "tiles 32 8"]:
    """The matrices of inner_forward.cu."""
    return jnp.concatenate([tiles(each) for each in (m.qkv, m.proj, m.fc1, m.fc2)])


def mlp_tiles(sizes: LayerSizes, m: PaddedMatrices) -> Float[Array, "tiles 32 8"]:
    """The matrices of inner_mlp_gradient.cu."""
    more = sizes.hidden_in_parts - sizes.hidden
    fc1, fc2 = jnp.pad(m.fc1, ((0, 0), (0, more))), jnp.pad(m.fc2, ((0, more), (0, 0)))
    return jnp.concatenate([tiles(each) for each in (m.qkv, m.proj, fc1, fc2.T, fc1[: sizes.channels].T)])


def attention_tiles(sizes: LayerSizes, m: PaddedMatrices) -> Float[Array, "tiles 32 8"]:
    """The matrices of inner_attention_gradient.cu."""
    by_head = m.qkv[: sizes.channels].T.reshape(sizes.heads, -1, sizes.channels)
    return jnp.concatenate([tiles(m.qkv), tiles(m.proj.T), *map(tiles, by_head)])


@functools.cache
def shared_bytes(sizes: LayerSizes) -> dict[str, int]:
    """The shared memory that a block of each kernel takes: the tiles of its matrices, and sums in their place."""

    def bytes_of(tiles: Callable, *arguments: Any) -> int:
        return 512 * jax.eval_shape(functools.partial(tiles, *arguments), matrices).shape[0]

    shapes = ((sizes.normed, 3 * sizes.merged), (sizes.merged, sizes.channels), (sizes.normed, sizes.hidden))
    shapes = (*shapes, (sizes.hidden, sizes.channels), (sizes.padded,))
    matrices = PaddedMatrices(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    of_mlp, of_attention = sum(_of_mlp_part(sizes)), sum(_of_attention_part(sizes))
    return {
        "inner_forward": bytes_of(forward_tiles) + 4 * sizes.padded,
        "inner_mlp_gradient": max(bytes_of(mlp_tiles, sizes), 512 * of_mlp),
        "inner_attention_gradient": max(bytes_of(attention_tiles, sizes), 512 * of_attention),
    }


def mlp_sums(sizes: LayerSizes) -> int:
    """Tiles of 16 x 8 sums of inner_mlp_gradient.cu, part by part: of fc1 and fc2, and a few of the bias."""
    return sizes.mlp_parts * sum(_of_mlp_part(sizes))


def _of_mlp_part(sizes: LayerSizes) -> tuple[int, int, int]:
    groups, hidden = sizes.padded // 8, sizes.hidden_in_parts // sizes.mlp_parts
    return sizes.normed // 16 * hidden // 8, hidden // 16 * groups, -(-groups * 2 // 4)


def attention_sums(sizes: LayerSizes) -> int:
    """The same of inner_attention_gradient.cu: of qkv and proj, part by part."""
    return sizes.attention_parts * sum(_of_attention_part(sizes))


def _of_attention_part(sizes: LayerSizes) -> tuple[int, int]:
    groups = sizes.merged // 8 // sizes.attention_parts
    return sizes.normed // 16 * 3 * groups, (groups + 1) // 2 * (sizes.padded // 8)


def gradients_of_mlp(sizes: LayerSizes, sums: Float[Array, "tiles 32 4"]) -> tuple[Array, Array, Array]:
    """Of fc1, fc2 and the bias."""
    groups, hidden = sizes.padded // 8, sizes.hidden_in_parts // sizes.mlp_parts
    of_fc1, of_fc2, _ = _of_mlp_part(sizes)
    parts = jnp.split(sums, sizes.mlp_parts)
    fc1 = [_matrix(part[:of_fc1], sizes.normed, hidden // 8) for part in parts]
    fc2 = [_matrix(part[of_fc1 : of_fc1 + of_fc2], hidden, groups) for part in parts]
    # Two numbers of each eight channels in a lane, to be added up over the lanes that differ in their words.
    bias = parts[0][of_fc1 + of_fc2 :].transpose(1, 0, 2).reshape(8, 4, -1)[..., : 2 * groups].sum(0)
    return (
        jnp.concatenate(fc1, axis=1)[:, : sizes.hidden],
        jnp.concatenate(fc2)[: sizes.hidden, : sizes.channels],
        bias.reshape(4, groups, 2).swapaxes(0, 1).reshape(-1),
    )


def gradients_of_attention(sizes: LayerSizes, sums: Float[Array, "tiles 32 4"]) -> tuple[Array, Array]:
    """Of qkv and proj."""
    qkv, proj = [], []
    of_qkv, _ = _of_attention_part(sizes)
    merged = sizes.merged // sizes.attention_parts
    for part in jnp.split(sums, sizes.attention_parts):
        qkv.append(_matrix(part[:of_qkv], sizes.normed, 3 * merged // 8))
        rows = (merged + 8) // 16 * 16
        proj.append(_matrix(part[of_qkv:], rows, sizes.padded // 8)[:merged, : sizes.channels])
    return jnp.concatenate(qkv, axis=1), jnp.concatenate(proj)


def _matrix(sums: Float[Array, "tiles 32 4"], rows: int, columns: int) -> Float[Array, "rows outputs"]:
    """A matrix of `rows` and 8 * `columns` from its tiles of 16 x 8."""
    parts = sums.reshape(rows // 16, columns, 8, 4, 2, 2)  # lane // 4, lane % 4, then halves of rows and of columns
    return parts.transpose(0, 4, 2, 1, 3, 5).reshape(rows, 8 * columns)
