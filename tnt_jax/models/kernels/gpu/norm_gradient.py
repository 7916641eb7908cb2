"""The gradient of a norm behind a linear map on NVIDIA GPUs, in one pass over memory: norm_gradient.cu."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tnt_jax.models.kernels.gpu import call
from tnt_jax.models.kernels.gpu.sizes import Rows


class NormGradient(NamedTuple):
    """The results of the kernel."""

    product: Float[Array, "rows outputs"]
    through: Float[Array, " rows"]
    """The gradient of a row of x through its deviation: of (x - mean) so many times is taken away."""
    offset: Float[Array, " outputs"]
    scale: Float[Array, " outputs"]
    bias: Float[Array, " outputs"]


def norm_gradient(
    sizes: Rows,
    multiprocessors: int,
    product: Float[Array, "rows outputs"],
    statistics: Float[Array, "rows 2"],
    cotangent: Float[Array, "rows outputs"],
    vectors: Float[Array, "3 outputs"],
) -> NormGradient:
    """The gradients of norm((product - mean left_over) inverse + offset) scale + bias.

    Args:
        statistics: mean and inverse of each row.
        vectors: offset, left_over and scale.
    """
    rows, width = product.shape
    warps, blocks = call.warps_and_blocks("norm_gradient", sizes)
    grid = max(1, min(multiprocessors * blocks, -(-rows // warps)))
    numbers = 3 * width // 32  # of a lane
    tiles = -(-numbers // 4)
    results = [
        jax.ShapeDtypeStruct(product.shape, product.dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((grid, tiles, 32, 4), jnp.float32),
    ]
    arrays = (product, statistics, cotangent, vectors, jnp.array([rows], jnp.int32))
    shared = max(512 * tiles, 4 * vectors.size)
    of_product, through, sums = call.launch("norm_gradient", sizes, arrays, results, grid=grid, shared=shared)
    by_lane = sums.sum(0).transpose(1, 0, 2).reshape(32, -1)[:, :numbers].reshape(32, 3, -1, 2)
    return NormGradient(of_product, through, *by_lane.transpose(1, 2, 0, 3).reshape(3, width))
