"""What a model is made of: parameters and multiply-accumulates, per part."""

import io

import jax
import rich.box
import rich.console
import rich.table
from flax import nnx

from tnt_jax.config import ModelConfig
from tnt_jax.models.tnt import WordEmbedding, grid_size, words_per_side
from tnt_jax.models.variants import abstract_model, resolve

PARTS = {
    "words": ("word_embedding", "word_positions"),
    "sentences": ("sentence_embedding", "class_token", "sentence_positions"),
    "inner transformers": ("inner",),
    "words to sentences": ("words_to_sentence",),
    "outer transformers": ("outer",),
    "norm and head": ("norm", "head"),
}

IN_BLOCKS = ("inner transformers", "words to sentences", "outer transformers")


def count_macs(config: ModelConfig) -> dict[str, int]:
    """Multiply-accumulates of one image, per part: those of convolutions, linear maps and both products of attention.

    Twice as many floating point operations. Norms, softmax, GELU and additions are not counted, as in the papers.
    """
    config = resolve(config)
    rows, columns = grid_size(config)
    patches, words = rows * columns, words_per_side(config) ** 2

    def transformer(tokens: int, dim: int) -> int:
        linear = 4 * dim * dim + 2 * dim * int(dim * config.mlp_ratio)
        return tokens * linear + 2 * tokens * tokens * dim

    to_sentence = patches * words * config.inner_dim * config.outer_dim
    return {
        "words": patches * words * config.inner_dim * WordEmbedding.kernel_size**2 * config.in_channels,
        "sentences": to_sentence,
        "inner transformers": config.depth * patches * transformer(words, config.inner_dim),
        "words to sentences": config.depth * to_sentence,
        "outer transformers": config.depth * transformer(1 + patches, config.outer_dim),
        "norm and head": config.outer_dim * config.num_classes,
    }


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part, counted on the module itself without allocating it."""
    model = abstract_model(config)
    part_of = {name: part for part, names in PARTS.items() for name in names}
    counts = dict.fromkeys(PARTS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
        name = path[2].key if path[0].key == "blocks" else path[0].key
        counts[part_of[name]] += leaf.size
    return counts


def summary(model: str | ModelConfig | nnx.Module, **changes) -> str:
    """A table of a model's parts, given by its name (and changes as for `create_model`), its configuration or itself.

    Raises:
        InputError: as `create_model`.
    """
    if isinstance(model, nnx.Module):
        config = model.config
    else:
        config = resolve(ModelConfig(name=model, **changes) if isinstance(model, str) else model)
    rows, columns = grid_size(config)
    side = words_per_side(config)
    words, tokens = (
        f"{rows * columns} x {side * side} x {config.inner_dim}",
        f"{1 + rows * columns} x {config.outer_dim}",
    )
    shapes = {
        "words": words,
        "sentences": tokens,
        "inner transformers": words,
        "words to sentences": f"{rows * columns} x {config.outer_dim}",
        "outer transformers": tokens,
        "norm and head": str(config.num_classes or config.outer_dim),
    }
    parameters, macs = count_parameters(config), count_macs(config)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_footer=True)
    table.add_column("part", footer="total")
    table.add_column("layers", justify="right")
    table.add_column("output per image")
    table.add_column("parameters", justify="right", footer=f"{sum(parameters.values()):,}")
    table.add_column("MACs per image", justify="right", footer=f"{sum(macs.values()):,}")
    table.add_column("share", justify="right", footer="100%")
    for part in PARTS:
        layers = str(config.depth) if part in IN_BLOCKS else "1"
        share = f"{macs[part] / sum(macs.values()):.1%}"
        table.add_row(part, layers, shapes[part], f"{parameters[part]:,}", f"{macs[part]:,}", share)
    height, width = config.image_size
    heading = f"{config.name} ({config.architecture}), {height} x {width} x {config.in_channels}, {config.dtype}"
    out = io.StringIO()
    console = rich.console.Console(file=out, width=110)
    console.print(heading, table, sep="\n", end="", highlight=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip()
