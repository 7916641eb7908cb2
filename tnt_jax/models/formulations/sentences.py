"""The ways to make a sentence of the words of a patch.

- `reference`: the equations, norm, linear map and norm.
- `pallas`: one kernel on TPUs, kernels/tpu/words_to_sentence.py.
- `folded`: on GPUs for whoever asks for the formulation `cuda`, the first norm folded into the linear map (folded.py),
  and the gradient up to it in a kernel, kernels/gpu/norm_gradient.cu.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.models.formulations.devices import gpu, mesh_obstacle, on_each_device, platform, say_once, tpu
from tnt_jax.models.formulations.folded import NormParameters, norm_linear_norm
from tnt_jax.models.formulations.inner import cuda_card_obstacle, pallas_obstacle, preferred
from tnt_jax.models.functions import NORM_EPSILON
from tnt_jax.models.kernels.gpu.sizes import Rows


def sentence_kernel(layer: nnx.Module, count: int) -> Callable | None:
    """The function of the words of so many sentences that gives them back and what a `WordsToSentence` makes of them,
    (sentences, outer); None where its equations do."""
    if _runs_pallas(layer, count):
        return functools.partial(sentence_pallas, layer)
    if _runs_folded(layer, count):
        return lambda words: (words, folded(layer, words, gpu()[1]))
    return None


def row_sizes(layer: nnx.Module) -> Rows:
    """The sizes that the CUDA kernel is compiled for."""
    return Rows(layer.proj.in_features, layer.proj.out_features, NORM_EPSILON)


def _runs_folded(layer: nnx.Module, sentences: int) -> bool:
    """True if a WordsToSentence runs `folded`. The fallback is silent: the inner layer says the reason."""
    if layer.formulation != "cuda" or platform() != "gpu" or layer.norm_each_word or layer.norm2 is None:
        return False
    if layer.foreign_part():
        return False
    from tnt_jax.models.kernels.gpu import call

    sizes = row_sizes(layer)
    obstacle = cuda_card_obstacle(layer.norm1.dtype) or mesh_obstacle(sentences)
    return sizes.covered and not obstacle and not call.means(sizes).obstacle


def _runs_pallas(layer: nnx.Module, sentences: int) -> bool:
    if preferred(layer.formulation) != "pallas":
        return False
    from tnt_jax.models.kernels.tpu import words_to_sentence
    from tnt_jax.models.kernels.tpu.tile import LANES

    obstacle = pallas_obstacle(sentences) or layer.foreign_part()
    if not obstacle and not words_to_sentence.covers_projection(layer.proj.in_features, layer.proj.out_features):
        obstacle = f"the Pallas kernel takes widths in multiples of {LANES}"
    if layer.norm_each_word or layer.norm2 is None:
        obstacle = obstacle or "the Pallas kernel normalises whole patches"
    if obstacle:
        say_once(f"words become sentences by the equations in XLA: {obstacle}")
    return obstacle is None


def sentence_pallas(
    layer: nnx.Module, words: Float[Array, "sentences words inner"], *, interpret: bool = False
) -> tuple[Float[Array, "sentences words inner"], Float[Array, "sentences outer"]]:
    """The words, and their sentences from one kernel; on a mesh, each device runs it on its own. `interpret` runs it
    anywhere."""
    from tnt_jax.models.kernels.tpu import words_to_sentence

    def column(vector: nnx.Param) -> Array:
        return vector[...].astype(jnp.float32)[:, None]

    norm1, proj, norm2 = layer.norm1, layer.proj, layer.norm2
    bias = jnp.zeros((proj.out_features, 1)) if proj.bias is None else column(proj.bias)
    parameters = words_to_sentence.Projection(
        column(norm1.scale),
        column(norm1.bias),
        proj.kernel[...].T.astype(jnp.float32),
        bias,
        column(norm2.scale),
        column(norm2.bias),
    )
    kernel = functools.partial(words_to_sentence.words_to_sentence, NORM_EPSILON, tpu(interpret=interpret))
    rows, sentences = on_each_device(kernel, (1, None), (1, 0))(words.reshape(words.shape[0], -1).T, parameters)
    return rows.T.reshape(words.shape), sentences


def folded(
    layer: nnx.Module, words: Float[Array, "sentences words inner"], multiprocessors: int | None
) -> Float[Array, "sentences outer"]:
    """The equations with the first norm in the linear map; on a mesh, each device has its own sentences.

    Args:
        multiprocessors: of the GPU whose kernel takes a part of the gradient; None for XLA's.
    """

    def held(parameter: nnx.Param) -> Array:
        return parameter[...].astype(jnp.float32)

    norm1, proj, norm2 = layer.norm1, layer.proj, layer.norm2
    rows = words.astype(norm1.dtype).reshape(words.shape[0], -1)
    bias = None if proj.bias is None else held(proj.bias)
    first, last = (NormParameters(held(norm.scale), held(norm.bias)) for norm in (norm1, norm2))
    run = functools.partial(norm_linear_norm, NORM_EPSILON, multiprocessors)
    return on_each_device(run, (0, None, None, None, None), 0)(rows, first, held(proj.kernel), bias, last)
