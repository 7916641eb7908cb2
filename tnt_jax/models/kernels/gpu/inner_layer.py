"""The inner transformer layer on NVIDIA GPUs, and its gradient: three kernels in CUDA C++ (inner_layer.h)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tnt_jax.models.kernels.gpu import call, folding
from tnt_jax.models.kernels.gpu.folding import PaddedMatrices
from tnt_jax.models.kernels.gpu.sizes import LayerSizes
from tnt_jax.models.kernels.parameters import LayerParameters


def inner_layer(
    sizes: LayerSizes,
    multiprocessors: int,
    words: Float[Array, "sentences words channels"],
    survival: Float[Array, "2 sentences"],
    parameters: LayerParameters,
) -> Float[Array, "sentences words channels"]:
    """The layer on bfloat16 words; `survival` is what stochastic depth multiplies the two branches of a sentence by.

    For the gradient the layer is computed again, from the words that it was given. Sums over sentences are added up in
    an order that depends on the number of multiprocessors alone: they are the same in every run.

    Args:
        multiprocessors: of the card.
        parameters: in float32, as the modules hold them.
    """
    return _folded_layer(sizes, multiprocessors, words, survival, folding.padded_matrices(sizes, parameters))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _folded_layer(sizes: LayerSizes, multiprocessors: int, words: Array, survival: Array, m: PaddedMatrices) -> Array:
    tiles = folding.forward_tiles(m).astype(words.dtype)
    arrays = (words, survival.astype(jnp.float32), tiles, m.bias, _count(words))
    (out,) = call.launch(
        "inner_forward",
        sizes,
        arrays,
        [jax.ShapeDtypeStruct(words.shape, words.dtype)],
        grid=_grid("inner_forward", sizes, multiprocessors, len(words)),
        shared=folding.shared_bytes(sizes)["inner_forward"],
    )
    return out


def _forward(sizes: LayerSizes, multiprocessors: int, words: Array, survival: Array, m: PaddedMatrices):
    return _folded_layer(sizes, multiprocessors, words, survival, m), (words, survival, m)


def _backward(sizes: LayerSizes, multiprocessors: int, saved: tuple, cotangent: Array):
    words, survival, m = saved

    def run(kernel: str, cotangent: Array, tiles: Array, sums: int) -> tuple[Array, Array]:
        """The cotangent of what a kernel was given, and tiles of sums over all sentences."""
        tiles, grid = tiles.astype(words.dtype), _grid(kernel, sizes, multiprocessors, len(words))
        results = [
            jax.ShapeDtypeStruct(words.shape, words.dtype),
            jax.ShapeDtypeStruct((grid, sums, 32, 4), jnp.float32),
        ]
        if kernel == "inner_mlp_gradient" and sizes.mlp_parts > 1:
            results.append(results[0])  # the words after attention, from one part to the next
        arrays = (words, survival.astype(jnp.float32), cotangent, tiles, _count(words))
        shared = folding.shared_bytes(sizes)[kernel]
        cotangent, sums, *_ = call.launch(kernel, sizes, arrays, results, grid=grid, shared=shared)
        return cotangent, sums.sum(0)

    cotangent, sums = run("inner_mlp_gradient", cotangent, folding.mlp_tiles(sizes, m), folding.mlp_sums(sizes))
    fc1, fc2, bias = folding.gradients_of_mlp(sizes, sums)
    tiles = folding.attention_tiles(sizes, m)
    cotangent, sums = run("inner_attention_gradient", cotangent, tiles, folding.attention_sums(sizes))
    qkv, proj = folding.gradients_of_attention(sizes, sums)
    return cotangent, jnp.zeros_like(survival), PaddedMatrices(qkv, proj, fc1, fc2, bias)


_folded_layer.defvjp(_forward, _backward)


def _count(words: Array) -> Array:
    return jnp.array([len(words)], jnp.int32)


def _grid(kernel: str, sizes: LayerSizes, multiprocessors: int, sentences: int) -> int:
    warps, blocks = call.warps_and_blocks(kernel, sizes)
    return max(1, min(multiprocessors * blocks, -(-sentences // warps)))
