"""How the words of a patch become a sentence: by the equations, or on TPUs in one Pallas kernel."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.models.formulations.devices import on_each_device, say_once, tpu
from tnt_jax.models.formulations.inner import pallas_obstacle, preferred
from tnt_jax.models.functions import NORM_EPSILON


def make_sentences(
    layer: nnx.Module, words: Float[Array, "sentences words inner"], batch: int
) -> tuple[Float[Array, "sentences words inner"], Float[Array, "batch patches outer"]]:
    """The words as they were given, and what a `WordsToSentence` makes of them."""
    if not runs_kernel(layer, words.shape[0]):
        return words, layer.reference(words, batch)
    words, sentences = pallas(layer, words)
    return words, sentences.reshape(batch, words.shape[0] // batch, -1)


def runs_kernel(layer: nnx.Module, sentences: int) -> bool:
    """Whether a WordsToSentence runs its kernel; XLA computes the equations of the others."""
    if preferred(layer.formulation) != "pallas":
        return False
    from tnt_jax.models.kernels.tpu import words_to_sentence
    from tnt_jax.models.kernels.tpu.tile import LANES

    proj = layer.proj
    obstacle = pallas_obstacle(sentences)
    if not words_to_sentence.covers_projection(proj.in_features, proj.out_features):
        obstacle = obstacle or f"the Pallas kernel takes widths in multiples of {LANES}"
    if layer.norm_each_word or layer.norm2 is None:
        obstacle = obstacle or "the Pallas kernel normalises whole patches"
    if obstacle:
        say_once(f"words become sentences by the equations in XLA: {obstacle}")
    return obstacle is None


def pallas(
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
