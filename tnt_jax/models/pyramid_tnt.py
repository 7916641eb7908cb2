"""PyramidTNT (arXiv 2201.00978), in forward order: after the stem, block, aggregation, stage, the network.

What differs from TNT: words and sentences come from a convolutional stem with batch norm, four stages with half the
rows and columns of sentences each, norms of the inner transformer over all words of a patch together, keys and values
from a coarser grid, a learned bias for every pair of query and key, no class token.
Source: huawei-noah/Efficient-AI-Backbones, tnt_pytorch/pyramid_tnt.py.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.calling import Images, block_indices, check_images, explains_forward_mode, training_key
from tnt_jax.models.formulations.gradients import parameter_add, parameter_einsum
from tnt_jax.models.functions import Keys, dropout, split_key
from tnt_jax.models.inner import InnerTransformer
from tnt_jax.models.layers import (
    Attention,
    LayerNorm,
    Linear,
    Rngs,
    TransformerLayer,
    initializer,
    rematerialised,
)
from tnt_jax.models.stem import PATCH_SIZE, WORD_STRIDE, WORDS_PER_SIDE, Stem, conv3x3
from tnt_jax.models.tnt import (
    WordsToSentence,
    drop_path_rates,
    grid_size,
    make_head,
    positions,
    to_patches,
)

STAGES = 4
STAGE_FIELDS = ("depth", "inner_dim", "inner_heads", "outer_dim", "outer_heads")
SPATIAL_REDUCTION = (4, 2, 1, 1)
"""Sentences along a side of the square whose mean gives a key and a value, in each stage."""


def inner_blocks(depth: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks with an inner transformer as published: the first of a stage; the second too if it has more than 6."""
    first = np.cumsum((0, *depth[:-1])).tolist()
    return tuple(start + j for start, blocks in zip(first, depth, strict=True) for j in range(1 + (blocks > 6)))


def check_pyramid(config: ModelConfig) -> None:
    """Raises InputError for sizes that PyramidTNT cannot have."""
    if (config.patch_size, config.word_stride) != (PATCH_SIZE, WORD_STRIDE):
        raise InputError(
            f"patch_size {config.patch_size} and word_stride {config.word_stride}: the stem of a PyramidTNT makes "
            f"patches of {PATCH_SIZE} pixels with a word every {WORD_STRIDE}"
        )
    least = PATCH_SIZE * max(SPATIAL_REDUCTION)
    if min(config.image_size) < least:
        raise InputError(f"image_size {config.image_size} is too small: the first stage needs {least} pixels a side")


def stage_config(config: ModelConfig, stage: int) -> ModelConfig:
    """The configuration with the sizes of one stage as single numbers, as the modules of TNT take it."""
    return dataclasses.replace(config, **{field: getattr(config, field)[stage] for field in STAGE_FIELDS})


def stage_grids(config: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of sentences in each stage; an odd number is halved to the larger half."""
    rows, columns = grid_size(config)
    return [(-(-rows // 2**stage), -(-columns // 2**stage)) for stage in range(STAGES)]


def key_grid(grid: tuple[int, int], reduction: int) -> tuple[int, int]:
    """Rows and columns of keys and values; what is left over at the border of an uneven grid gives none."""
    return grid[0] // reduction, grid[1] // reduction


class PatchNorm(LayerNorm):
    """Layer norm over all words of a patch together, with a scale and a bias for each channel of each word."""

    def __init__(self, dim: int, *, config: ModelConfig, rngs: Rngs):
        super().__init__(WORDS_PER_SIDE**2 * dim, config=config, rngs=rngs)

    def __call__(self, words: Float[Array, "sentences words inner"]) -> Float[Array, "sentences words inner"]:
        return super().__call__(words.reshape(words.shape[0], -1)).reshape(words.shape)


class ReducedAttention(Attention):
    """Attention whose keys and values are those of the means over squares of sentences (PVTv2's linear attention)."""

    one_input = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: tuple[int, int],
        reduction: int,
        config: ModelConfig,
        rngs: Rngs,
    ):
        super().__init__(dim, num_heads, config=config, rngs=rngs)
        self.grid, self.reduction = grid, reduction
        self.linear = Linear(dim, dim, config=config, rngs=rngs)
        self.norm = LayerNorm(dim, config=config, rngs=rngs)

    def query_key_value(
        self, x: Float[Array, "batch tokens dim"]
    ) -> tuple[Float[Array, "batch heads _ head_dim"], ...]:
        batch, _, dim = x.shape
        rows, columns = key_grid(self.grid, self.reduction)
        maps = x.reshape(batch, *self.grid, dim)[:, : rows * self.reduction, : columns * self.reduction]
        means = maps.reshape(batch, rows, self.reduction, columns, self.reduction, dim).mean(axis=(2, 4))
        reduced = self.norm(self.linear(means.reshape(batch, -1, dim)))
        if type(self.qkv) is Linear:
            of_query, of_rest = jnp.split(self.qkv.kernel[...], [dim], axis=1)
            query = parameter_einsum("bnd,de->bne", x, of_query, plain=self.plain)
            of_reduced = parameter_einsum("bnd,de->bne", reduced, of_rest, plain=self.plain)
        else:  # such as nnx.LoRALinear: it is called, though half of its results are not needed
            query, of_reduced = self.qkv(x)[..., :dim], self.qkv(reduced)[..., dim:]
        keys, value = jnp.split(of_reduced, 2, axis=-1)
        return tuple(
            part.reshape(batch, -1, self.num_heads, dim // self.num_heads).transpose(0, 2, 1, 3)
            for part in (query, keys, value)
        )


class Block(nnx.Module):
    """A TNT block without a class token; most have no inner transformer and pass on the words that they were given."""

    def __init__(
        self,
        drop_path_rate: float,
        *,
        has_inner: bool,
        grid: tuple[int, int],
        reduction: int,
        config: ModelConfig,
        rngs: Rngs,
    ):
        if has_inner:
            dim, heads = config.inner_dim, config.inner_heads
            self.inner = InnerTransformer(dim, heads, drop_path_rate, norm=PatchNorm, config=config, rngs=rngs)
            self.words_to_sentence = WordsToSentence(use_bias=False, config=config, rngs=rngs)
        else:
            self.inner = self.words_to_sentence = None
        reduced = functools.partial(ReducedAttention, grid=grid, reduction=reduction)
        self.outer = TransformerLayer(
            config.outer_dim,
            config.outer_heads,
            drop_path_rate,
            attention=Attention if reduction == 1 else reduced,
            squeeze_excitation=config.squeeze_excitation,
            config=config,
            rngs=rngs,
        )

    def run_inner(
        self,
        words: Float[Array, "sentences words inner"],
        sentences: Float[Array, "batch patches outer"],
        key: Keys | None = None,
    ) -> tuple[Float[Array, "sentences words inner"], Float[Array, "batch patches outer"]]:
        """Words and sentences after the inner transformer, if the block has one: what the outer one works on."""
        if self.inner is None:
            return words, sentences
        words = self.inner(words, key)
        words, from_words = self.words_to_sentence(words, batch=sentences.shape[0])
        return words, sentences + from_words

    def __call__(
        self,
        words: Float[Array, "sentences words inner"],
        sentences: Float[Array, "batch patches outer"],
        position_bias: Float[Array, "1 heads patches keys"],
        key: Keys | None = None,
    ) -> tuple[Float[Array, "sentences words inner"], Float[Array, "batch patches outer"]]:
        inner_key, outer_key = split_key(key, 2)
        words, sentences = self.run_inner(words, sentences, inner_key)
        return words, self.outer(sentences, outer_key, position_bias)


class Aggregation(nnx.Module):
    """From a stage to the next: 2 x 2 sentences become one, and their 8 x 8 words 4 x 4, each by norm and convolution.

    A grid with an odd side gets zeros at its end, as upstream pads it for detection.
    """

    def __init__(self, grid: tuple[int, int], *, config: ModelConfig, following: ModelConfig, rngs: Rngs):
        self.grid = grid
        self.word_norm = LayerNorm(config.inner_dim, config=config, rngs=rngs)
        self.word_conv = conv3x3(config.inner_dim, following.inner_dim, 2, config=config, rngs=rngs)
        self.sentence_norm = LayerNorm(config.outer_dim, config=config, rngs=rngs)
        self.sentence_conv = conv3x3(config.outer_dim, following.outer_dim, 2, config=config, rngs=rngs)

    def __call__(
        self, words: Float[Array, "sentences words inner"], sentences: Float[Array, "batch patches outer"]
    ) -> tuple[Float[Array, "new_sentences words new_inner"], Float[Array, "batch new_patches new_outer"]]:
        batch, side = sentences.shape[0], WORDS_PER_SIDE
        rows, columns = self.grid
        words = self.word_norm(words).reshape(batch, rows, columns, side, side, -1)
        words = jnp.pad(words, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0), (0, 0), (0, 0)))
        rows, columns = words.shape[1:3]
        # Words as they lie in the image, cut into squares of four sentences.
        image = words.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * side, columns * side, -1)
        words = self.word_conv(to_patches(image, 2 * side))
        sentences = self.sentence_conv(self.sentence_norm(sentences).reshape(batch, *self.grid, -1))
        return words.reshape(words.shape[0], side**2, -1), sentences.reshape(batch, -1, sentences.shape[-1])


class Stage(nnx.Module):
    """The blocks that work on one grid of sentences, with the bias of every pair of query and key that they share.

    `position_bias` is upstream's `relative_pos`, which is not relative: a free number for each pair of places.
    """

    def __init__(self, stage: int, *, rates: list[float], has_inner: list[bool], config: ModelConfig, rngs: Rngs):
        sizes, self.grid, reduction = stage_config(config, stage), stage_grids(config)[stage], SPATIAL_REDUCTION[stage]
        shape = (1, sizes.outer_heads, math.prod(self.grid), math.prod(key_grid(self.grid, reduction)))
        standard_normal = initializer(lambda rng, shape: rng.standard_normal(shape, np.float32))
        self.remat = config.remat
        self.position_bias = nnx.Param(standard_normal(rngs.params(), shape, jnp.dtype(config.param_dtype)))
        make = functools.partial(Block, grid=self.grid, reduction=reduction, config=sizes, rngs=rngs)
        self.blocks = nnx.List([make(rate, has_inner=has) for rate, has in zip(rates, has_inner, strict=True)])

    def __call__(
        self,
        words: Float[Array, "sentences words inner"],
        sentences: Float[Array, "batch patches outer"],
        key: Keys | None = None,
    ) -> list[tuple[Float[Array, "sentences words inner"], Float[Array, "batch patches outer"]]]:
        """The output of every block."""
        run = rematerialised(Block.__call__, self.remat)
        outputs = []
        for block, block_key in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            words, sentences = run(block, words, sentences, self.position_bias[...], block_key)
            outputs.append((words, sentences))
        return outputs


class PyramidTNT(nnx.Module):
    """The network. `tnt_jax.create_model` makes one from a name.

    Calling it without a key evaluates. With a key, or with `rngs` as Flax's modules take them, it trains: dropout and
    stochastic depth are drawn from the key, and batch norm uses the statistics of the batch and takes them into its
    running averages.
    """

    num_prefix_tokens = 0
    """Tokens before those of the patches: it has no class token."""

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        self.config = config
        self.deterministic: bool | None = None
        grids, sizes = stage_grids(config), [stage_config(config, stage) for stage in range(STAGES)]
        self.stem = Stem(config=sizes[0], rngs=rngs)
        words, sentences = WORDS_PER_SIDE**2, math.prod(grids[0])
        self.word_positions = positions(config.word_positions, words, sizes[0].inner_dim, config, rngs)
        self.sentence_positions = positions(config.sentence_positions, sentences, sizes[0].outer_dim, config, rngs)
        depth = sum(config.depth)
        rates = drop_path_rates(config.drop_path_rate, depth)
        has_inner = [index in config.inner_blocks for index in range(depth)]
        ends = np.cumsum(config.depth)
        of_stage = [slice(end - blocks, end) for end, blocks in zip(ends, config.depth, strict=True)]
        self.stages = nnx.List(
            [
                Stage(stage, rates=rates[blocks], has_inner=has_inner[blocks], config=config, rngs=rngs)
                for stage, blocks in enumerate(of_stage)
            ]
        )
        self.aggregations = nnx.List(
            [
                Aggregation(grid, config=before, following=after, rngs=rngs)
                for grid, before, after in zip(grids[:-1], sizes[:-1], sizes[1:], strict=True)
            ]
        )
        self.norm = LayerNorm(sizes[-1].outer_dim, config=config, rngs=rngs)
        self.head = make_head(sizes[-1].outer_dim, config=config, rngs=rngs)

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
        """Logits of normalised images in float32; with `num_classes=0`, the mean of the normalised sentences.

        Raises:
            InputError: the images have another shape than the model was made for, or are not normalised; or no key is
                given after `model.train()`.
        """
        mean = self.forward_features(images, key, rngs=rngs).astype(jnp.float32).mean(axis=1)
        return mean if self.head is None else self.head(mean)

    @explains_forward_mode
    def forward_features(
        self,
        images: Images,
        key: Keys | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch patches outer"]:
        """The sentences of the last stage after the last norm; there is no class token."""
        key = training_key(self, key, rngs)
        embed_key, *stage_keys = split_key(key, 1 + STAGES)
        words, sentences = self.embed(images, embed_key)
        for index in range(STAGES):
            words, sentences = self.stage_outputs(index, words, sentences, stage_keys[index])[-1]
        return self.norm(sentences)

    def embed(
        self, images: Images, key: Keys | None = None
    ) -> tuple[Float[Array, "sentences words inner"], Float[Array, "batch patches outer"]]:
        """The words and sentences that enter the first block, with their positions."""
        check_images(images, self.config)
        words, sentences = self.stem(images, training=key is not None)
        plain = self.config.inner == "reference"
        if self.word_positions is not None:
            words = parameter_add(words, self.word_positions[...], plain=plain)
        if self.sentence_positions is not None:
            places = self.sentence_positions[...]
            if key is not None and self.config.drop_rate:  # also where each image has a key of its own
                places = dropout(jnp.broadcast_to(places, sentences.shape), self.config.drop_rate, key)
            sentences = parameter_add(sentences, places, plain=plain)
        return words, sentences

    def enter(self, index: int, words: Array, sentences: Array) -> tuple[Array, Array]:
        """The input of a stage, from the output of the one before it."""
        return self.aggregations[index - 1](words, sentences) if index else (words, sentences)

    def stage_outputs(
        self, index: int, words: Array, sentences: Array, key: Keys | None = None
    ) -> list[tuple[Array, Array]]:
        """The outputs of a stage's blocks, from the output of the stage before it."""
        return self.stages[index](*self.enter(index, words, sentences), key)

    def forward_intermediates(
        self,
        images: Images,
        blocks: tuple[int, ...] | None = None,
        *,
        words: bool = False,
        key: Keys | None = None,
    ) -> list:
        """The sentences that the blocks with these indices return, as maps, in the order of the blocks.

        Args:
            blocks: counted from 0 over all stages; by default the last of each stage, a pyramid with strides 8 to 64.
            words: also gives the words of each patch.
            key: as for a call, trains.

        Returns:
            A list of (batch, rows, columns, outer). With `words=True`, a list of pairs: that map and
            (batch, rows, columns, words, inner). Neither is normalised.

        Raises:
            InputError: an index that is not a block; -1 is the last one.
        """
        ends = np.cumsum(self.config.depth).tolist()
        wanted = block_indices([end - 1 for end in ends] if blocks is None else blocks, ends[-1])
        embed_key, *stage_keys = split_key(key, 1 + STAGES)
        outputs, state = [], self.embed(images, embed_key)
        for index, (end, stage) in enumerate(zip(ends, self.stages, strict=True)):
            if end - len(stage.blocks) > max(wanted, default=-1):
                break
            of_blocks = self.stage_outputs(index, *state, stage_keys[index])
            state = of_blocks[-1]
            for block, (inner, sentences) in enumerate(of_blocks, start=end - len(stage.blocks)):
                if block in wanted:
                    maps = sentences.reshape(images.shape[0], *stage.grid, -1)
                    words_of_patches = inner.reshape(*maps.shape[:3], *inner.shape[1:])
                    outputs.append((maps, words_of_patches) if words else maps)
        return outputs

    def extract_feat(self, images: Images) -> tuple[Float[Array, "batch outer"]]:
        """The mean of the normalised sentences, in a tuple of one, as mmpretrain's `extract_feat` returns it."""
        return (self.forward_features(images).astype(jnp.float32).mean(axis=1),)

    def attention_maps(self, images: Images) -> tuple[list[Array | None], list[Array]]:
        """The attention weights of every block.

        Returns:
            inner: per block (batch, rows, columns, heads, words, words), None for one without an inner transformer;
            outer: per block (batch, heads, patches, keys), a key for each square of sentences that the stage's spatial
            reduction has. float32, rows sum to one. Computed here alone: a plain call never makes them twice.
        """
        inner, outer, state = [], [], self.embed(images)
        for index, stage in enumerate(self.stages):
            entering = self.enter(index, *state)
            returned = stage(*entering)
            for block, (words, sentences) in zip(stage.blocks, [entering, *returned[:-1]], strict=True):
                inner.append(None)
                if block.inner is not None:
                    weights = block.inner.attention_weights(words)
                    inner[-1] = weights.reshape(images.shape[0], *stage.grid, *weights.shape[1:])
                _, sentences = block.run_inner(words, sentences)
                outer.append(block.outer.attention_weights(sentences, stage.position_bias[...]))
            state = returned[-1]
        return inner, outer
