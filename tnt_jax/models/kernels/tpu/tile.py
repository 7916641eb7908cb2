"""A tile of 1,024 sentences on a TPU: where its channels lie in registers, the arithmetic of a layer on it, and how a
kernel goes from tile to tile.

inner_block.py, whose kernels are made of these, says why it is so.
"""

import math
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
# Blocks, twice each, and scratch of the largest kernel, the backward one of TNT-B's inner block, fit; TNT-S has less.
VMEM_LIMIT = 60 * 2**20  # bytes

# 0.5 x (1 + tanh(x (c0 + c1 x^2 + c2 x^4))) is within 2.6e-5 of the exact GELU, a hundredth of what bfloat16 resolves,
# at a quarter of erf's arithmetic. The polynomial is good up to x^2 = 36, where tanh is 1.
TANH_GELU = (0.7975065863506916, 0.03700682712698995, -0.0003517086390328484)
TANH_GELU_LIMIT = 36.0


class Machine(NamedTuple):
    """The sizes that kernels are compiled for."""

    cores: int = 1
    """That share the steps of a kernel, where its grid says that they may."""
    packs: bool = False
    """True if there is arithmetic between registers of bfloat16, which hold twice as much."""
    interpret: bool = False
    """Run step by step on any platform, for tests."""


class Sizes(NamedTuple):
    """A layer that the kernels of the inner block are made for."""

    words: int
    channels: int
    heads: int
    epsilon: float
    dtype: DTypeLike  # of matrix products; everything else is float32

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def exact(self) -> bool:
        """True if GELU is the exact one."""
        return self.dtype == jnp.float32


def covers_layer(words: int, channels: int, heads: int) -> bool:
    """True if the kernels can run a layer: the channels of a word fill whole registers, in bfloat16 those of two."""
    return words % 2 == 0 and channels % SUBLANES == 0 and channels % heads == 0


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A matrix product over these axes, summed in float32; float32 factors are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


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


def gelu_scale(dtype: DTypeLike) -> float:
    """The factor of the inputs of `scaled_gelu`, so that it has no constants to multiply by."""
    return 0.5**0.5 if dtype == jnp.float32 else (-TANH_GELU[2]) ** 0.2


def scaled_gelu(x: Array, *, exact: bool, derivative: bool = False) -> tuple[Array, ...]:
    """GELU(x / s) * 2 * s, s being the `gelu_scale`, and its derivative if asked for."""
    if exact:
        once = 1 + lax.erf(x)
        return (x * once, once + x * (2 * math.pi**-0.5) * jnp.exp(-x * x)) if derivative else (x * once,)
    c0, c1, c2 = TANH_GELU
    scale = gelu_scale(jnp.bfloat16)
    # c0 + c1 x^2 + c2 x^4 as a square that is completed: there is less to compute.
    shift = c1 / (2 * c2) * scale**2
    height = c0 / scale + shift**2
    square = x * x
    shifted = jnp.minimum(square + shift, TANH_GELU_LIMIT * scale**2 + shift)
    falling = height - shifted * shifted
    tanh = jnp.tanh(x * falling)
    once = 1 + tanh
    if not derivative:
        return (x * once,)
    return x * once, once + x * ((1 - tanh * tanh) * (falling - 4 * (square * shifted)))


def total(terms: list[Array]) -> Array:
    """The sum, added in pairs: a short chain of dependent additions."""
    while len(terms) > 1:
        terms = [terms[i] + terms[i + 1] if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
    return terms[0]


def compiler_params(*, adds_up: bool) -> pltpu.CompilerParams:
    """For a grid of (cores, steps), where the steps of a core follow each other if they add something up."""
    any_order, in_order = pltpu.GridDimensionSemantics.PARALLEL, pltpu.GridDimensionSemantics.ARBITRARY
    return pltpu.CompilerParams(
        vmem_limit_bytes=VMEM_LIMIT, dimension_semantics=(any_order, in_order if adds_up else any_order)
    )


class Steps(NamedTuple):
    """The steps of a kernel, shared by the cores: each takes its share of them one after the other."""

    count: int
    cores: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.cores, pl.cdiv(self.count, self.cores)

    @classmethod
    def shared(cls, count: int, cores: int) -> "Steps":
        """A core without a step would write a block that it never computed."""
        return cls(count, min(cores, count))

    def of(self, core: Array, turn: Array) -> Array:
        """The step of a core's turn; one that has a step less stays at the last one."""
        return jnp.minimum(core * self.grid[1] + turn, self.count - 1)

    def run(self, kernel: Callable, sums: Sequence) -> None:
        """Calls a kernel with its step; what a core adds up over its steps starts as zeros."""

        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in sums:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        step = pl.program_id(0) * self.grid[1] + pl.program_id(1)
        if self.count % self.cores:
            pl.when(step < self.count)(lambda: kernel(step))
        else:
            kernel(step)


def in_hbm(array: Array, machine: Machine) -> Array:
    """An argument of a kernel that lies in HBM.

    XLA puts arrays into VMEM where there is room, which differs from block to block, and compiles a kernel once for
    each of the ways. Interpreted, XLA may not look into it either: for CPUs it would make products of transposed
    bfloat16 that it cannot run.
    """
    return (
        lax.optimization_barrier(array) if machine.interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)
    )


def result_in_hbm(shape: jax.ShapeDtypeStruct, machine: Machine) -> Any:
    """A result of a kernel that lies in HBM."""
    return shape if machine.interpret else pltpu.HBM(shape.shape, shape.dtype)


class PerSentence(NamedTuple):
    """An array, or the shape of one, with a column (axis 1) or a row (axis 0) for each sentence."""

    value: Array | jax.ShapeDtypeStruct
    axis: int = 1

    def block(self, tile_of: Callable) -> pl.BlockSpec:
        """The columns or rows of a tile, whose number a function of the grid's indices gives."""
        if self.axis:
            return pl.BlockSpec((self.value.shape[0], TILE), lambda *at: (0, tile_of(*at)))
        return pl.BlockSpec((TILE, self.value.shape[1]), lambda *at: (tile_of(*at), 0))


def over_tiles(
    name: str,
    kernel: Callable,
    arrays: Sequence[PerSentence],
    parameters: Sequence[Array],
    results: Sequence[PerSentence],
    *,
    sums: Sequence[tuple[int, int]] = (),
    scratch: Sequence[jax.ShapeDtypeStruct] = (),
    flops: int,
    machine: Machine,
) -> list[Array]:
    """Runs a kernel for one tile after the other; what it returns beyond the last sentence is cut off.

    Args:
        kernel: takes the number of the tile's first sentence, then references to what follows here.
        parameters: the same for all tiles.
        sums: shapes of float32 arrays that the kernel adds to, for all tiles; they start as zeros.
        scratch: arrays in VMEM.
        flops: of all sentences, for the compiler's account.
    """
    first = arrays[0]
    steps = Steps.shared(pl.cdiv(first.value.shape[first.axis], TILE), machine.cores)

    def whole(value) -> pl.BlockSpec:
        return pl.BlockSpec(value.shape, lambda core, step: (0, 0))

    def of_core(shape: tuple[int, int]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda core, step: (core, 0, 0))

    def body(*refs) -> None:
        before = len(arrays) + len(parameters) + len(results)
        steps.run(lambda tile: kernel(tile * TILE, *refs), refs[before : before + len(sums)])

    added = [jax.ShapeDtypeStruct((steps.cores, *shape), jnp.float32) for shape in sums]
    moved = [*(array.value for array in (*arrays, *results)), *parameters, *added]
    call = pl.pallas_call(
        body,
        grid=steps.grid,
        in_specs=[*(array.block(steps.of) for array in arrays), *map(whole, parameters)],
        out_specs=[*(result.block(steps.of) for result in results), *map(of_core, sums)],
        out_shape=[result_in_hbm(shape, machine) for shape in (*(result.value for result in results), *added)],
        scratch_shapes=[pltpu.VMEM(each.shape, each.dtype) for each in scratch],
        compiler_params=compiler_params(adds_up=bool(sums)),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=sum(value.size * value.dtype.itemsize for value in moved)
        ),
        interpret=machine.interpret,
        name=name,
    )
    returned = call(*(in_hbm(value, machine) for value in (*(array.value for array in arrays), *parameters)))
    return [*returned[: len(results)], *(each.sum(0) for each in returned[len(results) :])]


def is_sentence(first: Array, sentences: int, axis: int = 1) -> Array:
    """The columns (axis 1) or rows (axis 0) of the tile that begins with this sentence which are sentences.

    What lies beyond the last one is undefined, and would spoil sums.
    """
    shape = (1, TILE) if axis else (TILE, 1)
    return lax.broadcasted_iota(jnp.int32, shape, axis) < sentences - first
