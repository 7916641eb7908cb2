"""A forward pass that tells its attention weights, words and sentences, with the gradient of a score by each."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tnt_jax.models.formulations.attention import attention_weights
from tnt_jax.models.formulations.gradients import product
from tnt_jax.models.variants import Model

Tell = Callable[[str, Array], Array]
"""Takes note of a value by its name and returns what the network goes on with."""


class ObservedAttention(nnx.Module):
    """An `Attention` that tells its weights, (batch, heads, queries, keys)."""

    formulation = "reference"

    def __init__(self, attention: nnx.Module, name: str, tell: Tell):
        self.attention, self.name, self.tell = attention, name, tell

    def __call__(self, x: Array, key: None = None, bias: Array | None = None) -> Array:
        query, keys, value = self.attention.query_key_value(x)
        weights = self.tell(self.name, attention_weights(query, keys, bias, plain=True))
        return self.attention.merge_heads(product(weights, value, plain=True))


class ObservedWordsToSentence(nnx.Module):
    """Words to sentence that tells the words of a block, and once more the same words on their way to the sentence."""

    def __init__(self, module: nnx.Module, tell: Tell):
        self.module, self.tell = module, tell

    def __call__(self, words: Array, batch: int) -> tuple[Array, Array]:
        words = self.tell("words", words)
        _, from_words = self.module(self.tell("projected", words), batch)
        return words, from_words


class ObservedLayer(nnx.Module):
    """An outer transformer layer that tells the sentences that it returns."""

    def __init__(self, layer: nnx.Module, tell: Tell):
        self.layer, self.tell = layer, tell

    def __call__(self, x: Array, key: None = None, bias: Array | None = None, added: Array | None = None) -> Array:
        return self.tell("sentences", self.layer(x, key, bias, added))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """The output of a block, or the gradient of a score by it. None stands for an inner transformer that is not there.

    The first axis is the images'. A TNT's class token is the first of its sentences, queries and keys.
    """

    inner: Float[Array, "batch patches heads words words"] | None
    outer: Float[Array, "batch heads queries keys"]
    words: Float[Array, "batch patches words inner"] | None
    projected: Float[Array, "batch patches words inner"] | None
    """The same words; the gradient is that of the way through this block's sentences alone."""
    sentences: Float[Array, "batch tokens outer"]


def blocks_of(model: Model) -> list[nnx.Module]:
    """The blocks of a model, over all stages."""
    if model.config.architecture == "pyramid":
        return [block for stage in model.stages for block in stage.blocks]
    return list(model.blocks)


@functools.partial(jax.jit, static_argnums=0)
def observe(
    graph: nnx.GraphDef,
    state: nnx.State,
    images: Float[Array, "batch height width channels"],
    classes: Int[Array, " batch"],
) -> tuple[list[Observed], list[Observed]]:
    """The values of every block for normalised images, and the gradient by them of the logit of each image's class.

    Args:
        graph, state: a model of the formulation `reference`.
    """
    seen: list[dict] = []

    def scored(changes: list[dict] | None, images: Array) -> tuple[Array, list[dict]]:
        model = nnx.merge(graph, state)
        seen.clear()

        def tell(index: int, name: str, value: Array) -> Array:
            changed = value if changes is None else value + changes[index][name]
            seen[index][name] = changed
            return changed

        for index, block in enumerate(blocks_of(model)):
            seen.append({})
            of_block = functools.partial(tell, index)
            if block.inner is not None:
                block.inner.attn = ObservedAttention(block.inner.attn, "inner", of_block)
                block.words_to_sentence = ObservedWordsToSentence(block.words_to_sentence, of_block)
            block.outer.attn = ObservedAttention(block.outer.attn, "outer", of_block)
            block.outer = ObservedLayer(block.outer, of_block)
        logits = model(images)
        score = jnp.take_along_axis(logits, classes[:, None], axis=1).sum()
        return score, [dict(each) for each in seen]

    with jax.default_matmul_precision("highest"):
        _, shapes = jax.eval_shape(functools.partial(scored, None), images)
        zeros = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), shapes)
        gradients, values = jax.grad(scored, has_aux=True)(zeros, images)
    batch = images.shape[0]
    return [_observed(each, batch) for each in values], [_observed(each, batch) for each in gradients]


def _observed(of_block: dict[str, Array], batch: int) -> Observed:
    def by_image(name: str) -> Array | None:
        value = of_block.get(name)
        return None if value is None else value.reshape(batch, -1, *value.shape[1:])

    return Observed(
        by_image("inner"), of_block["outer"], by_image("words"), by_image("projected"), of_block["sentences"]
    )
