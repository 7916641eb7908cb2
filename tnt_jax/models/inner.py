"""The inner transformer, which relates the words of one patch: one set of parameters, one interface, and more than one
way to compute it.

A block calls it and knows nothing of how it is computed. Words are few and narrow, so what is fast depends on the
machine (docs/performance.md):

- `reference`: the equations as the paper has them, (sentences, words, channels).
- `native`: the whole layer as one function in C for CPUs, kernels/inner_layer.c.
- `feature_major`: sentences on the last axis, which fills the registers of TPUs and GPUs; attention is elementwise.
- `pallas`: the whole layer in one TPU kernel, kernels/inner_block.py, and what makes sentences of its words in another.

Where a platform or a size does not allow one, `pallas` falls back to `feature_major` and the others to `reference`,
with a line in the log.
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tnt_jax.config import ModelConfig
from tnt_jax.models.gradients import platform
from tnt_jax.models.kernels import inner_layer, on_cpu, words_to_sentence
from tnt_jax.models.kernels.devices import mesh_obstacle, on_each_device
from tnt_jax.models.kernels.inner_block import inner_block
from tnt_jax.models.kernels.tile import LANES, SUBLANES, Layer, Sizes, covers
from tnt_jax.models.layers import (
    NORM_EPSILON,
    InitialRngs,
    LayerNorm,
    TransformerLayer,
    gelu,
    split_key,
    survivors,
)

log = logging.getLogger(__name__)


class InnerTransformer(TransformerLayer):
    """Equations 6 and 7 of the paper: a transformer layer on the words of each patch, all patches of all images side by
    side.

    The words of a patch are one row, so stochastic depth drops a branch per patch, as the published code does.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path_rate: float,
        *,
        norm: Callable[..., nnx.Module] = LayerNorm,
        config: ModelConfig,
        rngs: InitialRngs,
    ):
        super().__init__(dim, num_heads, drop_path_rate, norm=norm, config=config, rngs=rngs)
        self.formulation = config.inner
        self.dtype = jnp.dtype(config.dtype)
        self.has_dropout = bool(config.drop_rate or config.attn_drop_rate)
        self.norm_axes = (1,) if norm is LayerNorm else (0, 1)

    def __call__(
        self, words: Float[Array, "sentences words inner"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "sentences words inner"]:
        formulation = choose(self, words.shape[0], training=key is not None)
        if formulation == "reference":
            return super().__call__(words, key)
        count, num_words, channels = words.shape
        if formulation == "native":
            return native(self, words, self.branch_survival(count, key))
        run = {"feature_major": feature_major, "pallas": pallas}[formulation]
        # Transposing moves nothing: XLA gives the words the layout that the formulation wants.
        out = run(self, words.reshape(count, -1).T, self.branch_survival(count, key))
        return out.T.reshape(count, num_words, channels)

    def branch_survival(self, sentences: int, key: PRNGKeyArray | None) -> Float[Array, "2 sentences"]:
        """What stochastic depth multiplies the two branches of each sentence by, drawn as `reference` draws it."""
        _, attn_key, _, mlp_key = split_key(key, 4)
        return jnp.stack([survivors(sentences, self.drop_path_rate, each) for each in (attn_key, mlp_key)])

    def columns(self) -> Layer:
        """The parameters as columns and matrices that multiply from the left."""

        def matrix(linear: nnx.Linear) -> Array:
            return linear.kernel[...].T.astype(jnp.float32)

        def column(vector: nnx.Param) -> Array:
            return vector[...].astype(jnp.float32)[:, None]

        return Layer(
            column(self.norm1.scale),
            column(self.norm1.bias),
            matrix(self.attn.qkv),
            matrix(self.attn.proj),
            column(self.attn.proj.bias),
            column(self.norm2.scale),
            column(self.norm2.bias),
            matrix(self.mlp.fc1),
            column(self.mlp.fc1.bias),
            matrix(self.mlp.fc2),
            column(self.mlp.fc2.bias),
        )


def choose(layer: InnerTransformer, sentences: int, *, training: bool) -> str:
    """The formulation that a layer runs: the one that was asked for, if platform and sizes allow it."""
    asked = _preferred(layer.formulation)
    if asked == "pallas" and (obstacle := _obstacle(sentences) or _size_obstacle(layer)):
        _log_once(f"inner transformer of {layer.attn.qkv.in_features} channels: feature_major, because {obstacle}")
        asked = "feature_major"
    obstacle = None
    if asked == "native":
        obstacle = on_cpu.obstacle("inner_layer", layer.dtype, sentences)
    if asked != "reference" and training and layer.has_dropout:
        obstacle = obstacle or f"{asked} has no dropout"
    if obstacle:
        _log_once(f"inner transformer of {layer.attn.qkv.in_features} channels: reference, because {obstacle}")
    return "reference" if obstacle else asked


def runs_kernel(projection: nnx.Module, sentences: int) -> bool:
    """Whether a WordsToSentence runs its kernel; XLA makes the others of its equations."""
    if _preferred(projection.formulation) != "pallas":
        return False
    proj = projection.proj
    obstacle = _obstacle(sentences)
    if not words_to_sentence.covers(proj.in_features, proj.out_features):
        obstacle = obstacle or f"the Pallas kernel wants widths in multiples of {LANES}"
    if projection.norm_each_word or projection.norm2 is None:
        obstacle = obstacle or "the Pallas kernel normalises whole patches"
    if obstacle:
        _log_once(f"words to sentence, {proj.in_features} to {proj.out_features}: plain JAX, because {obstacle}")
    return obstacle is None


def _preferred(asked: str) -> str:
    if asked != "auto":
        return asked
    return {"tpu": "pallas", "cpu": "native"}.get(platform(), "feature_major")


def _obstacle(sentences: int) -> str | None:
    """Why no Pallas kernel can run on so many sentences here, or None."""
    if platform() != "tpu":
        return f"the Pallas kernel runs on TPUs, and this is a {platform()}"
    return mesh_obstacle(sentences)


def _size_obstacle(layer: InnerTransformer) -> str | None:
    """Why the kernel cannot run this layer, or None."""
    if not covers(layer.attn.qkv.in_features, layer.attn.num_heads):
        return f"the Pallas kernel wants channels in multiples of {SUBLANES}"
    if layer.norm_axes != (1,):
        return "the Pallas kernel normalises each word by itself"
    return None


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def native(
    layer: InnerTransformer, words: Float[Array, "sentences words channels"], survival: Float[Array, "2 sentences"]
) -> Float[Array, "sentences words channels"]:
    """The layer as one function in C; on a mesh, each device runs it on its own sentences."""
    norm1, attn, norm2, mlp = layer.norm1, layer.attn, layer.norm2, layer.mlp
    parameters = inner_layer.Parameters(
        norm1.scale, norm1.bias, attn.qkv.kernel, attn.proj.kernel, attn.proj.bias,
        norm2.scale, norm2.bias, mlp.fc1.kernel, mlp.fc1.bias, mlp.fc2.kernel, mlp.fc2.bias,
    )  # fmt: skip
    parameters = inner_layer.Parameters(*(each[...].astype(jnp.float32) for each in parameters))
    kernel = functools.partial(inner_layer.inner_layer, attn.num_heads, NORM_EPSILON)
    return on_each_device(kernel, (0, 1, None), 0)(words, survival, parameters)


def pallas(
    layer: InnerTransformer,
    words: Float[Array, "rows sentences"],
    survival: Float[Array, "2 sentences"],
    *,
    interpret: bool = False,
) -> Float[Array, "rows sentences"]:
    """The layer in one kernel; on a mesh, each device runs it on its own sentences. `interpret` runs it anywhere."""
    channels = layer.attn.qkv.in_features
    sizes = Sizes(words.shape[0] // channels, channels, layer.attn.num_heads, NORM_EPSILON, layer.dtype)
    kernel = functools.partial(inner_block, sizes, interpret)
    return on_each_device(kernel, (1, 1, None), 1)(words, survival, layer.columns())


def pallas_words_to_sentence(
    projection: nnx.Module, words: Float[Array, "sentences words inner"], *, interpret: bool = False
) -> tuple[Float[Array, "sentences words inner"], Float[Array, "sentences outer"]]:
    """A WordsToSentence in one kernel, as `pallas`, and the words that it was given."""

    def column(vector: nnx.Param) -> Array:
        return vector[...].astype(jnp.float32)[:, None]

    norm1, proj, norm2 = projection.norm1, projection.proj, projection.norm2
    bias = jnp.zeros((proj.out_features, 1)) if proj.bias is None else column(proj.bias)
    layer = words_to_sentence.Projection(
        column(norm1.scale),
        column(norm1.bias),
        proj.kernel[...].T.astype(jnp.float32),
        bias,
        column(norm2.scale),
        column(norm2.bias),
    )
    kernel = functools.partial(words_to_sentence.words_to_sentence, NORM_EPSILON, interpret)
    rows, sentences = on_each_device(kernel, (1, None), (1, 0))(words.reshape(words.shape[0], -1).T, layer)
    return rows.T.reshape(words.shape), sentences


def feature_major(
    layer: InnerTransformer, words: Float[Array, "rows sentences"], survival: Float[Array, "2 sentences"]
) -> Float[Array, "rows sentences"]:
    """The layer with sentences on the last axis: no axis of 24 channels or 16 words is left to be padded."""
    p, dtype, heads = layer.columns(), layer.dtype, layer.attn.num_heads
    channels = layer.attn.qkv.in_features
    x = words.reshape(-1, channels, words.shape[-1]).astype(jnp.float32)

    def norm(x: Array, scale: Array, bias: Array) -> Float[Array, "words channels sentences"]:
        centred = x - x.mean(layer.norm_axes, keepdims=True)
        normed = centred * jax.lax.rsqrt((centred * centred).mean(layer.norm_axes, keepdims=True) + NORM_EPSILON)
        # A norm has as many parameters as the words and channels that it looks at.
        return normed * scale.reshape(-1, channels, 1) + bias.reshape(-1, channels, 1)

    def linear(matrix: Array, x: Array) -> Float[Array, "words outputs sentences"]:
        matrix, x = matrix.astype(dtype), x.astype(dtype)
        return jnp.einsum("oc,wcn->won", matrix, x, preferred_element_type=jnp.float32)

    def attention(h: Array) -> Float[Array, "words channels sentences"]:
        qkv = linear(p.qkv, h).astype(dtype).reshape(h.shape[0], 3, heads, -1, h.shape[-1])
        query, key, value = (qkv[:, part].astype(jnp.float32) for part in range(3))
        scores = (query[:, None] * key[None]).sum(3) * query.shape[2] ** -0.5  # (queries, keys, heads, sentences)
        weights = jax.nn.softmax(scores, axis=1)
        return (weights[:, :, :, None] * value[None]).sum(1).reshape(h.shape)

    x = x + (linear(p.proj, attention(norm(x, p.norm1_scale, p.norm1_bias))) + p.proj_bias) * survival[0]
    hidden = gelu(linear(p.fc1, norm(x, p.norm2_scale, p.norm2_bias)) + p.fc1_bias)
    x = x + (linear(p.fc2, hidden) + p.fc2_bias) * survival[1]
    return x.reshape(words.shape).astype(words.dtype)
