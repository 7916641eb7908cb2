"""The summary of a model: parameters and multiply-accumulates, per part."""

import io
import math

import jax
import numpy as np
import rich.box
import rich.console
import rich.table
from flax import nnx

from tnt_jax.config import ModelConfig
from tnt_jax.models.formulations.inner import choose_inner
from tnt_jax.models.heads import head_macs
from tnt_jax.models.pyramid_tnt import SPATIAL_REDUCTION, STAGES, key_grid, stage_config, stage_grids
from tnt_jax.models.tnt import TNT, WordEmbedding, grid_size, words_per_side
from tnt_jax.models.variants import abstract_model, model_config

_BLOCK_PARTS = {
    "inner transformers": ("inner",),
    "words to sentences": ("words_to_sentence",),
    "outer transformers": ("outer", "position_bias"),
}
TNT_PARTS = {
    "words": ("word_embedding", "word_positions"),
    "sentences": ("sentence_embedding", "class_token", "sentence_positions"),
    **_BLOCK_PARTS,
    "norm and head": ("norm", "decoder", "head"),
}
PYRAMID_PARTS = {
    "stem": ("stem", "word_positions", "sentence_positions"),
    **_BLOCK_PARTS,
    "aggregations": ("aggregations",),
    "norm and head": ("norm", "decoder", "head"),
}


def count_macs(config: ModelConfig) -> dict[str, int]:
    """Multiply-accumulates of one image, per part: those of convolutions, linear maps and both products of attention.

    Twice as many floating point operations. Norms, softmax, GELU and additions are not counted, as in the papers.
    """
    return _pyramid_macs(config) if config.architecture == "pyramid" else _tnt_macs(config)


def _tnt_macs(config: ModelConfig) -> dict[str, int]:
    rows, columns = grid_size(config)
    patches, words = rows * columns, words_per_side(config) ** 2
    tokens = TNT.num_prefix_tokens + patches
    blocks = _block_macs(config, patches, tokens, tokens, config.depth, len(config.inner_blocks))
    return {
        "words": patches * words * config.inner_dim * WordEmbedding.kernel_size**2 * config.in_channels,
        "sentences": patches * words * config.inner_dim * config.outer_dim,
        **blocks,
        "norm and head": head_macs(config),
    }


def _pyramid_macs(config: ModelConfig) -> dict[str, int]:
    grids, sizes = stage_grids(config), [stage_config(config, stage) for stage in range(STAGES)]
    patches = [rows * columns for rows, columns in grids]
    dim, outer_dim = sizes[0].inner_dim, sizes[0].outer_dim
    # Products of channels of the five 3x3 convolutions, at 16, 16, 4, 1 and 1 places for each sentence.
    channels = 16 * (config.in_channels * 2 * dim + 2 * dim * dim) + 4 * 8 * dim**2 + 32 * dim**2 + 8 * dim * outer_dim
    macs = {"stem": 9 * patches[0] * channels} | dict.fromkeys(_BLOCK_PARTS, 0) | {"aggregations": 0}
    first = 0
    for stage, size in enumerate(sizes):
        rows, columns = key_grid(grids[stage], SPATIAL_REDUCTION[stage])
        inner = sum(first <= block < first + size.depth for block in config.inner_blocks)
        first += size.depth
        for part, count in _block_macs(size, patches[stage], patches[stage], rows * columns, size.depth, inner).items():
            macs[part] += count
        if SPATIAL_REDUCTION[stage] > 1:
            macs["outer transformers"] += size.depth * rows * columns * size.outer_dim**2
    for count, before, after in zip(patches[1:], sizes[:-1], sizes[1:], strict=True):
        words = words_per_side(config) ** 2 * before.inner_dim * after.inner_dim
        macs["aggregations"] += 9 * count * (words + before.outer_dim * after.outer_dim)
    return macs | {"norm and head": head_macs(config)}


def _block_macs(config: ModelConfig, patches: int, tokens: int, keys: int, depth: int, inner: int) -> dict[str, int]:
    """Of `depth` blocks, `inner` of them with an inner transformer, for tokens that attend to keys."""

    def transformer(tokens: int, keys: int, dim: int) -> int:
        query_proj_mlp = 2 * dim * dim + 2 * dim * int(dim * config.mlp_ratio)
        return tokens * query_proj_mlp + keys * 2 * dim * dim + 2 * tokens * keys * dim

    words = words_per_side(config) ** 2
    squeeze = 2 * config.outer_dim * (config.outer_dim // 4) if config.squeeze_excitation else 0
    return {
        "inner transformers": inner * patches * transformer(words, words, config.inner_dim),
        "words to sentences": inner * patches * words * config.inner_dim * config.outer_dim,
        "outer transformers": depth * (transformer(tokens, keys, config.outer_dim) + squeeze),
    }


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part, counted on the module itself without allocating it. Running averages are none."""
    model = abstract_model(config)
    parts = PYRAMID_PARTS if model.config.architecture == "pyramid" else TNT_PARTS
    part_of = {name: part for part, names in parts.items() for name in names}
    counts = dict.fromkeys(parts, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        counts[next(part_of[entry.key] for entry in path if entry.key in part_of)] += leaf.size
    return counts


def _output_shapes(config: ModelConfig) -> dict[str, str]:
    """The output shape of each part for one image: sentences x words x channels, or tokens x channels."""
    words_each = words_per_side(config) ** 2
    if config.architecture == "pyramid":
        ends = [(0, 0), (-1, STAGES - 1)]
        patches = {stage: rows * columns for stage, (rows, columns) in enumerate(stage_grids(config))}
        words = " to ".join(f"{patches[stage]} x {words_each} x {config.inner_dim[i]}" for i, stage in ends)
        tokens = sentences = " to ".join(f"{patches[stage]} x {config.outer_dim[i]}" for i, stage in ends)
        before = {"stem": f"{patches[0]} x {config.outer_dim[0]}", "aggregations": tokens}
        width = config.outer_dim[-1]
    else:
        patches = math.prod(grid_size(config))
        words = f"{patches} x {words_each} x {config.inner_dim}"
        sentences, tokens = (f"{count} x {config.outer_dim}" for count in (patches, TNT.num_prefix_tokens + patches))
        before = {"words": words, "sentences": tokens}
        width = config.outer_dim
    return before | {
        "inner transformers": words,
        "words to sentences": sentences,
        "outer transformers": tokens,
        "norm and head": str(config.num_classes or width),
    }


def _formulation(config: ModelConfig) -> str:
    """The way in which the inner transformers are computed on this machine, in training."""
    model = abstract_model(config)
    blocks = model.blocks if config.architecture != "pyramid" else [b for stage in model.stages for b in stage.blocks]
    rows, columns = grid_size(config)
    # A multiple of any number of devices, as the patches of a batch that can be divided among them are.
    sentences = rows * columns * jax.device_count()
    words = words_per_side(config) ** 2
    chosen = {choose_inner(block.inner, sentences, words, training=True) for block in blocks if block.inner is not None}
    return " and ".join(sorted(chosen)) or "none"


def summary(model: str | ModelConfig | nnx.Module, **changes) -> str:
    """A table of a model's parts, given by its name (and changes as for `create_model`), its configuration or itself.

    Raises:
        InputError: as `create_model`.
    """
    if isinstance(model, nnx.Module):
        config = model.config
    else:
        config = model_config(model, **changes) if isinstance(model, str) else model
    shapes, inner = _output_shapes(config), len(config.inner_blocks)
    layers = {
        "inner transformers": inner,
        "words to sentences": inner,
        "outer transformers": int(np.sum(config.depth)),
        "aggregations": STAGES - 1,
    }
    parameters, macs = count_parameters(config), count_macs(config)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_footer=True)
    table.add_column("part", footer="total")
    table.add_column("layers", justify="right")
    table.add_column("output per image")
    table.add_column("parameters", justify="right", footer=f"{sum(parameters.values()):,}")
    table.add_column("MACs per image", justify="right", footer=f"{sum(macs.values()):,}")
    table.add_column("share", justify="right", footer="100%")
    for part in macs:
        share = f"{macs[part] / sum(macs.values()):.1%}"
        table.add_row(part, str(layers.get(part, 1)), shapes[part], f"{parameters[part]:,}", f"{macs[part]:,}", share)
    height, width = config.image_size
    heading = (
        f"{config.name} ({config.architecture}), {height} x {width} x {config.in_channels}, {config.dtype}, "
        f"inner transformers: {_formulation(config)}"
    )
    out = io.StringIO()
    console = rich.console.Console(file=out, width=110)
    console.print(heading, table, sep="\n", end="", highlight=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip()
