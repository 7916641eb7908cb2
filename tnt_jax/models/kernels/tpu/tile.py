"""A tile of 1,024 sentences on a TPU: where its channels lie in registers, the arithmetic of a layer on it, and how a
kernel goes from tile to tile.

inner_block.py, whose kernels are made of these, says why it is so.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array

LANES, SUBLANES = 128, 8
TILE = LANES * SUBLANES  # sentences
# Blocks, twice each, and scratch of the largest kernel, the backward one of TNT-B's inner block, are 34 MiB in bfloat16
# and 45 in float32; TNT-S has less.
VMEM_LIMIT = 60 * 2**20  # bytes

# 0.5 x (1 + tanh(x (c0 + c1 x^2 + c2 x^4))) is within 2.6e-5 of the exact GELU, a hundredth of what bfloat16 resolves,
# at a quarter of erf's arithmetic. The polynomial is good up to x^2 = 36, where tanh is 1.
TANH_GELU = (0.7975065863506916, 0.03700682712698995, -0.0003517086390328484)
TANH_GELU_LIMIT = 36.0


class Sizes(NamedTuple):
    """What the kernels are compiled for."""

    words: int
    channels: int
    heads: int
    epsilon: float
    dtype: DTypeLike  # of matrix products; everything else is float32

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def pitch(self) -> int:
        """Rows from one channel to the next where a register holds one channel of one word; odd, see above."""
        return self.words * SUBLANES + 1


def covers_layer(channels: int, heads: int) -> bool:
    """Whether the kernels can run a layer: its channels fill whole registers."""
    return channels % SUBLANES == 0 and channels % heads == 0


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A matrix product over these axes, summed in float32; float32 factors are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def normalise_columns(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Columns with mean 0 and variance 1, and what they were multiplied by."""
    centred = x - jnp.mean(x, 0, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred * centred, 0, keepdims=True) + epsilon)
    return centred * scale, scale


def normalise_columns_gradient(gradient: Array, normed: Array, scale: Array) -> Array:
    """Gradient of what `normalise_columns` was given, from that of its result."""
    along = jnp.mean(gradient * normed, 0, keepdims=True)
    return scale * (gradient - jnp.mean(gradient, 0, keepdims=True) - normed * along)


def through_norm(dh: list, parts: list, scale_ref, dscale_ref, dbias_ref) -> list:
    """Gradients of what a norm was given; those of its scale and bias are added up."""
    dbias_ref[...] += total(dh)
    dscale_ref[...] += total([dh * normed for dh, (normed, _) in zip(dh, parts, strict=True)])
    return [normalise_columns_gradient(dh * scale_ref[...], *part) for dh, part in zip(dh, parts, strict=True)]


def gelu_and_derivative(x: Array, *, exact: bool) -> tuple[Array, Array]:
    """GELU and its derivative."""
    if exact:
        cdf = 0.5 + 0.5 * lax.erf(x * 0.5**0.5)
        return x * cdf, cdf + x * (2 * jnp.pi) ** -0.5 * jnp.exp(-0.5 * x * x)
    square = jnp.minimum(x * x, TANH_GELU_LIMIT)
    c0, c1, c2 = TANH_GELU
    tanh = jnp.tanh(x * (c0 + square * (c1 + square * c2)))
    cdf = 0.5 + 0.5 * tanh
    derivative = c0 + square * (3 * c1 + square * (5 * c2))
    return x * cdf, cdf + 0.5 * x * (1 - tanh * tanh) * derivative


def total(terms: list[Array]) -> Array:
    """The sum, added in pairs: a short chain of dependent additions."""
    while len(terms) > 1:
        terms = [terms[i] + terms[i + 1] if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
    return terms[0]


def channel_of_word(sizes: Sizes, channel: int, word: Array | int) -> pl.Slice:
    """The register (8, 128) that holds one channel of one word of all sentences."""
    return pl.ds(channel * sizes.pitch + word * SUBLANES, SUBLANES)


def channels_of_word(sizes: Sizes, first: int, count: int, word: Array, group: int) -> pl.Slice:
    """The rows of `count` channels of one word, for the 128 sentences of a group."""
    return pl.ds(first * sizes.pitch + word * SUBLANES + group, count, stride=sizes.pitch)


def blocks_of_word(sizes: Sizes, word: Array) -> list[tuple]:
    """Where the channels of a word lie in a matrix (words * channels, 1024), for each group of 128 sentences."""
    rows = pl.ds(pl.multiple_of(word * sizes.channels, SUBLANES), sizes.channels)
    return [(rows, pl.ds(group * LANES, LANES)) for group in range(SUBLANES)]


def with_matrices_in(dtype: DTypeLike, parameters: tuple[Array, ...]) -> tuple[Array, ...]:
    """Parameters as the kernels take them: columns stay what they are.

    It is done within the functions that have a gradient of their own, so that the parameters' gradients are float32.
    """
    return type(parameters)(*(value if value.shape[1] == 1 else value.astype(dtype) for value in parameters))


def compiler_params(*, adds_up: bool) -> pltpu.CompilerParams:
    """A v5p has two cores, which share the steps of a kernel unless it adds something up over them."""
    order = pltpu.GridDimensionSemantics.ARBITRARY if adds_up else pltpu.GridDimensionSemantics.PARALLEL
    return pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, dimension_semantics=(order,))


def in_hbm(array: Array, interpret: bool) -> Array:
    """An argument of a kernel that lies in HBM.

    XLA puts arrays into VMEM where there is room, which differs from block to block, and compiles a kernel once for
    each of the ways.
    """
    return array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def result_in_hbm(shape: jax.ShapeDtypeStruct, interpret: bool) -> Any:
    """A result of a kernel that lies in HBM."""
    return shape if interpret else pltpu.HBM(shape.shape, shape.dtype)


class PerSentence(NamedTuple):
    """An array, or the shape of one, with a column (axis 1) or a row (axis 0) for each sentence."""

    value: Array | jax.ShapeDtypeStruct
    axis: int = 1

    @property
    def block(self) -> pl.BlockSpec:
        if self.axis:
            return pl.BlockSpec((self.value.shape[0], TILE), lambda tile: (0, tile))
        return pl.BlockSpec((TILE, self.value.shape[1]), lambda tile: (tile, 0))


def over_tiles(
    name: str,
    kernel: Callable,
    arrays: Sequence[PerSentence],
    parameters: Sequence[Array],
    results: Sequence[PerSentence],
    *,
    sums: bool = False,
    scratch: Sequence[tuple[int, int]] = (),
    flops: int,
    interpret: bool,
) -> list[Array]:
    """Runs a kernel for one tile after the other; what it returns beyond the last sentence is cut off.

    Args:
        parameters: the same for all tiles.
        sums: the kernel also returns the gradients of the parameters, added up over all tiles; those of a vector with
            128 partial sums, which are added here. They are float32.
        scratch: shapes of float32 arrays in VMEM.
        flops: of all sentences, for the compiler's account.
    """

    def whole(value) -> pl.BlockSpec:
        return pl.BlockSpec(value.shape, lambda tile: (0, 0))

    def sum_of(value: Array) -> jax.ShapeDtypeStruct:
        height, width = value.shape
        return jax.ShapeDtypeStruct((height, LANES if width == 1 else width), jnp.float32)

    gradients = [sum_of(value) for value in parameters] if sums else []
    moved = [*(array.value for array in (*arrays, *results)), *parameters, *gradients]
    first = arrays[0]
    call = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(first.value.shape[first.axis], TILE),),
        in_specs=[*(array.block for array in arrays), *map(whole, parameters)],
        out_specs=[*(result.block for result in results), *map(whole, gradients)],
        out_shape=[result_in_hbm(shape, interpret) for shape in (*(result.value for result in results), *gradients)],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=compiler_params(adds_up=sums),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=sum(value.size * value.dtype.itemsize for value in moved)
        ),
        interpret=interpret,
        name=name,
    )
    returned = list(call(*(in_hbm(value, interpret) for value in (*(array.value for array in arrays), *parameters))))
    for index, parameter in enumerate(parameters if sums else (), start=len(results)):
        if parameter.shape[1] == 1:
            returned[index] = returned[index].sum(1, keepdims=True)
    return returned


def is_sentence(sentences: int, axis: int = 1) -> Array:
    """Which columns (axis 1) or rows (axis 0) of the tile at hand are sentences.

    What lies beyond the last one is undefined, and would spoil sums.
    """
    shape = (1, TILE) if axis else (TILE, 1)
    return lax.broadcasted_iota(jnp.int32, shape, axis) < sentences - pl.program_id(0) * TILE


def start_sums(refs: Sequence) -> None:
    """Zeroes at the first tile what is added up over all of them."""

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)
