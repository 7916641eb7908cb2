"""Transformer in Transformer (arXiv 2103.00112), in forward order: words, words to sentence, block, the network.

Two networks go by this name. "official" is huawei-noah/Efficient-AI-Backbones tnt_pytorch/tnt.py, which is timm's
`tnt_s_patch16_224` since version 1.0.16. "legacy" is contrastive/pytorch-image-models, which was timm's until then, is
`tnt_s_legacy_patch16_224` now, and is mmpretrain's `tnt-small-p16`. They differ in the stem and in the
words-to-sentence projection of every block, and nowhere else.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.config import ModelConfig
from tnt_jax.models.calling import Images, block_indices, check_images, explains_forward_mode, training_key
from tnt_jax.models.formulations.gradients import parameter_add, parameter_einsum
from tnt_jax.models.formulations.outer import add_to_patches
from tnt_jax.models.formulations.sentences import sentence_kernel
from tnt_jax.models.functions import Keys, dropout, split_key
from tnt_jax.models.inner import InnerTransformer
from tnt_jax.models.layers import (
    LayerNorm,
    Linear,
    Rngs,
    TransformerLayer,
    fan_in_uniform,
    foreign_part,
    normal_init,
    rematerialised,
)


def words_per_side(config: ModelConfig) -> int:
    """Words along one side of a patch."""
    return -(-config.patch_size // config.word_stride)


def grid_size(config: ModelConfig) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = config.image_size
    return height // config.patch_size, width // config.patch_size


def to_patches(
    x: Float[Array, "batch height width channels"], size: int
) -> Float[Array, "sentences size size channels"]:
    """Cuts maps into squares, row by row, images one after the other."""
    batch, height, width, channels = x.shape
    # Pixels and channels of a row are one axis: three channels alone would fill no register.
    x = x.reshape(batch, height // size, size, width // size, size * channels)
    return x.transpose(0, 1, 3, 2, 4).reshape(-1, size, size, channels)


def map_of_words(
    words: Float[Array, "batch rows columns words channels"],
) -> Float[Array, "batch word_rows word_columns channels"]:
    """Each word where it lies in the image."""
    batch, rows, columns, count, channels = words.shape
    side = math.isqrt(count)
    squares = words.reshape(batch, rows, columns, side, side, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * side, columns * side, channels)


class WordEmbedding(nnx.Module):
    """Image to words: a 7x7 convolution whose outputs are the words, row by row in each patch (equation 5).

    "official" cuts the image first and pads every patch with zeros, so that no word sees another patch;
    "legacy" convolves the whole image and cuts the result.
    """

    kernel_size = 7

    def __init__(self, *, config: ModelConfig, rngs: Rngs):
        self.patch_size, self.words_per_side, self.stride = (
            config.patch_size,
            words_per_side(config),
            config.word_stride,
        )
        self.cut_first = config.architecture == "official"
        self.plain = config.inner == "reference"
        init = fan_in_uniform(config.in_channels * self.kernel_size**2)
        self.conv = nnx.Conv(
            config.in_channels,
            config.inner_dim,
            (self.kernel_size, self.kernel_size),
            kernel_init=init,
            bias_init=init,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(self, images: Images) -> Float[Array, "sentences words inner"]:
        """The convolution as one matrix product.

        As a convolution, the gradient of its kernel takes XLA ten times as long on a CPU, and three input channels fill
        no unit of a TPU.
        """
        dtype, inner = self.conv.dtype, self.conv.out_features
        kernel, bias = self.conv.kernel[...], self.conv.bias[...]
        if self.cut_first:
            patches = to_patches(jnp.asarray(images, dtype), self.patch_size)
            matrix = whole_patch_matrix(kernel, self.patch_size, self.stride)
            words = parameter_einsum("np,pw->nw", patches.reshape(patches.shape[0], -1), matrix, plain=self.plain)
            return parameter_add(words.reshape(patches.shape[0], -1, inner), bias, plain=self.plain)
        windows = unfold(jnp.asarray(images, dtype), self.kernel_size, self.stride)
        rows = windows.reshape(-1, windows.shape[-1])
        words = parameter_einsum("np,pc->nc", rows, kernel.reshape(-1, inner), plain=self.plain)
        words = parameter_add(words, bias, plain=self.plain)
        words = to_patches(words.reshape(*windows.shape[:3], inner), self.words_per_side)
        return words.reshape(words.shape[0], -1, inner)


def whole_patch_matrix(
    kernel: Float[Array, "size size channels inner"], patch_size: int, stride: int
) -> Float[Array, "pixels outputs"]:
    """The matrix by which a zero-padded convolution takes all pixels of a patch to all its words.

    Five times the convolution's arithmetic, a hundredth of the network's, and no window is ever cut out.
    """
    size, _, channels, inner = kernel.shape
    words = -(-patch_size // stride)
    padded = jnp.pad(kernel, ((patch_size, patch_size), (patch_size, patch_size), (0, 0), (0, 0)))

    def at_words(x: Array, axis: int) -> Array:
        # Where pixel i meets word w, the kernel's element i - (w * stride - size // 2); zeros lie beyond its ends.
        starts = [patch_size + size // 2 - word * stride for word in range(words)]
        return jnp.stack([jax.lax.slice_in_dim(x, i, i + patch_size, axis=axis) for i in starts], axis=axis + 1)

    matrix = at_words(at_words(padded, 1), 0)  # (row, word row, column, word column, channel, inner)
    return matrix.transpose(0, 2, 4, 1, 3, 5).reshape(patch_size**2 * channels, words**2 * inner)


def unfold(x: Float[Array, "n height width channels"], size: int, stride: int) -> Float[Array, "n rows columns window"]:
    """The square windows that a convolution with padding size // 2 sees, in the order of its kernel."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    rows, columns = -(-height // stride), -(-width // stride)
    views = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(views, axis=-1)


class WordsToSentence(nnx.Module):
    """All words of a patch to one vector of the outer width: norm, flatten, linear, norm (equation 8).

    The embedding and the official blocks normalise the flattened words and the result; the linear map of an official
    block has no bias.
    A legacy block normalises each word by itself, has the bias, and does not normalise the result.
    """

    def __init__(self, *, in_legacy_block: bool = False, use_bias: bool, config: ModelConfig, rngs: Rngs):
        flat_dim = words_per_side(config) ** 2 * config.inner_dim
        self.formulation = config.inner
        self.norm_each_word = in_legacy_block
        self.norm1 = LayerNorm(config.inner_dim if in_legacy_block else flat_dim, config=config, rngs=rngs)
        self.proj = Linear(flat_dim, config.outer_dim, use_bias=use_bias, config=config, rngs=rngs)
        self.norm2 = None if in_legacy_block else LayerNorm(config.outer_dim, config=config, rngs=rngs)

    def __call__(
        self, words: Float[Array, "sentences words inner"], batch: int
    ) -> tuple[Float[Array, "sentences words inner"], Float[Array, "batch patches outer"]]:
        """The words as they were given, and their sentences.

        Go on with the words that are returned: their two gradients then meet in the kernel.
        """
        if kernel := sentence_kernel(self, words.shape[0]):
            words, sentences = kernel(words)
            return words, sentences.reshape(batch, words.shape[0] // batch, -1)
        normed = self.norm1(words) if self.norm_each_word else words
        flat = normed.reshape(batch, words.shape[0] // batch, -1)
        sentences = self.proj(flat if self.norm_each_word else self.norm1(flat))
        return words, sentences if self.norm2 is None else self.norm2(sentences)

    def foreign_part(self) -> str | None:
        """As `TransformerLayer.foreign_part`."""
        norms = {"norm1": (self.norm1, LayerNorm)}
        norms |= {} if self.norm2 is None else {"norm2": (self.norm2, LayerNorm)}
        return foreign_part(proj=(self.proj, Linear), **norms)


class Block(nnx.Module):
    """One TNT block (equations 6 to 10): words talk within their patch, join their sentence, and sentences talk.

    The class token gets no words, and the words-to-sentence branch is never dropped. A block without an inner
    transformer (TNT-S-1 to TNT-S-4 in table 5 of the paper) passes its words on and adds none.
    """

    def __init__(self, drop_path_rate: float, *, has_inner: bool, config: ModelConfig, rngs: Rngs):
        legacy = config.architecture == "legacy"
        if has_inner:
            dim, heads = config.inner_dim, config.inner_heads
            self.inner = InnerTransformer(dim, heads, drop_path_rate, config=config, rngs=rngs)
            self.words_to_sentence = WordsToSentence(in_legacy_block=legacy, use_bias=legacy, config=config, rngs=rngs)
        else:
            self.inner = self.words_to_sentence = None
        self.outer = TransformerLayer(
            config.outer_dim,
            config.outer_heads,
            drop_path_rate,
            squeeze_excitation=config.squeeze_excitation,
            config=config,
            rngs=rngs,
        )

    def __call__(
        self,
        words: Float[Array, "sentences words inner"],
        sentences: Float[Array, "batch tokens outer"],
        key: Keys | None = None,
    ) -> tuple[Float[Array, "sentences words inner"], Float[Array, "batch tokens outer"]]:
        inner_key, outer_key = split_key(key, 2)
        from_words = None
        if self.inner is not None:
            words = self.inner(words, inner_key)
            words, from_words = self.words_to_sentence(words, batch=sentences.shape[0])
        return words, self.outer(sentences, outer_key, added=from_words)


def positions(wanted: bool, count: int, dim: int, config: ModelConfig, rngs: Rngs) -> nnx.Param | None:
    """Learned positions (1, count, dim), or None for the networks of table 6 of the paper that have none."""
    if not wanted:
        return None
    return nnx.Param(normal_init(rngs.params(), (1, count, dim), jnp.dtype(config.param_dtype)))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of every block, rising linearly from 0."""
    return [last * index / max(depth - 1, 1) for index in range(depth)]


def make_head(dim: int, *, config: ModelConfig, rngs: Rngs) -> Linear | None:
    """The map to logits, which are float32 whatever the rest is computed in; None where there are no classes."""
    if not config.num_classes:
        return None
    return Linear(dim, config.num_classes, config=dataclasses.replace(config, dtype="float32"), rngs=rngs)


class TNT(nnx.Module):
    """The network that gives a class of the image; those of pixels and boxes are in heads.py.
    `tnt_jax.create_model` makes one from a name.

    Calling it without a key evaluates. With a key, or with `rngs` as Flax's modules take them, it trains: dropout and
    stochastic depth are drawn from the key. Modules hold parameters and sizes, no random state.
    """

    num_prefix_tokens = 1
    """Tokens before those of the patches, as timm calls it: the class token."""

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        self.config = config
        self.deterministic: bool | None = None
        rows, columns = grid_size(config)
        param_dtype = jnp.dtype(config.param_dtype)
        self.word_embedding = WordEmbedding(config=config, rngs=rngs)
        words = words_per_side(config) ** 2
        self.word_positions = positions(config.word_positions, words, config.inner_dim, config, rngs)
        self.sentence_embedding = WordsToSentence(use_bias=True, config=config, rngs=rngs)
        self.class_token = nnx.Param(normal_init(rngs.params(), (1, 1, config.outer_dim), param_dtype))
        tokens = self.num_prefix_tokens + rows * columns
        self.sentence_positions = positions(config.sentence_positions, tokens, config.outer_dim, config, rngs)
        self.blocks = nnx.List(
            [
                Block(rate, has_inner=index in config.inner_blocks, config=config, rngs=rngs)
                for index, rate in enumerate(drop_path_rates(config.drop_path_rate, config.depth))
            ]
        )
        self.norm = LayerNorm(config.outer_dim, config=config, rngs=rngs)
        self.head = make_head(config.outer_dim, config=config, rngs=rngs)

    def set_view(self, deterministic: bool | None = None) -> None:
        """The mode that `nnx.view` changes: calls evaluate whatever they are given, train, or decide (None)."""
        self.deterministic = deterministic

    def __call__(
        self,
        images: Images,
        key: Keys | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits of normalised images in float32; with `num_classes=0`, the normalised class token.

        Raises:
            InputError: the images have another shape than the model was made for, or are not normalised; or no key is
                given after `model.train()`.
        """
        class_token = self.forward_features(images, key, rngs=rngs)[:, 0].astype(jnp.float32)
        return class_token if self.head is None else self.head(class_token)

    @explains_forward_mode
    def forward_features(
        self,
        images: Images,
        key: Keys | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch tokens outer"]:
        """All tokens after the last norm, the class token first."""
        key = training_key(self, key, rngs)
        embed_key, *block_keys = split_key(key, 1 + len(self.blocks))
        words, sentences = self.embed(images, embed_key)
        run = rematerialised(Block.__call__, self.config.remat)
        for block, block_key in zip(self.blocks, block_keys, strict=True):
            words, sentences = run(block, words, sentences, block_key)
        return self.norm(sentences)

    def embed(
        self, images: Images, key: Keys | None = None
    ) -> tuple[Float[Array, "sentences words inner"], Float[Array, "batch tokens outer"]]:
        """The words and sentences that enter the first block, with their positions."""
        check_images(images, self.config)
        dtype, plain = jnp.dtype(self.config.dtype), self.config.inner == "reference"
        batch = images.shape[0]
        words = self.word_embedding(images)
        if self.word_positions is not None:
            words = parameter_add(words, self.word_positions[...], plain=plain)
        class_tokens = jnp.zeros((batch, 1, self.config.outer_dim), dtype)
        class_tokens = parameter_add(class_tokens, self.class_token[...], plain=plain)
        words, from_words = self.sentence_embedding(words, batch)
        sentences = jnp.concatenate([class_tokens, from_words], axis=1)
        if self.sentence_positions is not None:
            sentences = parameter_add(sentences, self.sentence_positions[...], plain=plain)
        return words, dropout(sentences, self.config.drop_rate, key)

    def forward_intermediates(
        self,
        images: Images,
        blocks: tuple[int, ...] | None = None,
        *,
        words: bool = False,
        key: Keys | None = None,
    ) -> list:
        """The sentences that the blocks with these indices return (all by default), as maps, in the order of the
        blocks. With a key, as for a call, dropout and stochastic depth are drawn from it.

        Returns:
            A list of (batch, rows, columns, outer). With `words=True`, a list of pairs: that map and the words of each
            patch,
            (batch, rows, columns, words, inner). Neither is normalised, and the class token is left out.

        Raises:
            InputError: an index that is not a block; -1 is the last one.
        """
        wanted = block_indices(range(len(self.blocks)) if blocks is None else blocks, len(self.blocks))
        outputs = []
        embed_key, *block_keys = split_key(key, 1 + len(self.blocks))
        inner, sentences = self.embed(images, embed_key)
        grid = (images.shape[0], *grid_size(self.config))
        run = rematerialised(Block.__call__, self.config.remat)
        for index, (block, block_key) in enumerate(zip(self.blocks, block_keys, strict=True)):
            if index > max(wanted, default=-1):
                break
            inner, sentences = run(block, inner, sentences, block_key)
            if index in wanted:
                maps = sentences[:, self.num_prefix_tokens :].reshape(*grid, -1)
                outputs.append((maps, inner.reshape(*grid, *inner.shape[1:])) if words else maps)
        return outputs

    def extract_feat(self, images: Images) -> tuple[Float[Array, "batch outer"]]:
        """The normalised class token, in a tuple of one, as mmpretrain's `extract_feat` returns it."""
        return (self.forward_features(images)[:, 0],)

    def attention_maps(self, images: Images) -> tuple[list[Array | None], list[Array]]:
        """The attention weights of every block.

        Returns:
            inner: per block (batch, rows, columns, heads, words, words), None for one without an inner transformer;
            outer: per block (batch, heads, 1 + patches, 1 + patches), class token first. float32, rows sum to one.
            Computed here alone: a plain call never makes them twice.
        """
        inner, outer = [], []
        words, sentences = self.embed(images)
        grid = (images.shape[0], *grid_size(self.config))
        for block in self.blocks:
            inner.append(None)
            if block.inner is not None:
                weights = block.inner.attention_weights(words)
                inner[-1] = weights.reshape(*grid, *weights.shape[1:])
                words = block.inner(words)
                words, from_words = block.words_to_sentence(words, grid[0])
                sentences = add_to_patches(sentences, from_words)
            outer.append(block.outer.attention_weights(sentences))
            sentences = block.outer(sentences)
        return inner, outer
