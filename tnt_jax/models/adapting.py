"""Parameters of one model for another: other channels or size of the images, or other classes."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.heads import DETECTORS, decoder_dim, of_classes
from tnt_jax.models.layers import normal_init, resize_positions
from tnt_jax.models.pyramid_tnt import SPATIAL_REDUCTION, key_grid, stage_grids
from tnt_jax.models.tnt import grid_size
from tnt_jax.models.variants import abstract_model

# What of a configuration says nothing of the parameters, or what `adapt` knows how to change.
_FREE = {"name", "image_size", "in_channels", "num_classes", "drop_rate", "attn_drop_rate", "drop_path_rate"}
_FREE |= {"dtype", "param_dtype", "remat", "inner", "head", "head_drop_rate"}


def adapt(
    parameters: Mapping[str, np.ndarray | jax.Array], config: ModelConfig, wanted: ModelConfig, *, seed: int = 0
) -> tuple[dict[str, np.ndarray | jax.Array], list[str]]:
    """A model with changes: positions are resized to another image size, another number of classes gets a fresh head,
    and the first filters are adapted to other channels.

    Places have the positions of sentences, and in a PyramidTNT the bias of every pair of them in each stage.

    Args:
        parameters: by dotted path, of the resolved configuration `config`.
        wanted: the resolved configuration of the model that is to have them.
        seed: of a fresh head.

    Returns:
        The parameters, and what was changed, for people.

    Raises:
        InputError: the configurations differ in anything else that parameters depend on.
    """
    fields = [field.name for field in dataclasses.fields(config) if field.name not in _FREE]
    if differ := [name for name in fields if getattr(config, name) != getattr(wanted, name)]:
        pairs = (f"{name} {getattr(config, name)} (wanted: {getattr(wanted, name)})" for name in differ)
        raise InputError(f"the parameters are those of another model: they have {', '.join(pairs)}")
    adapted, notes = dict(parameters), []
    if wanted.in_channels != config.in_channels:
        path = FIRST_FILTERS[config.architecture == "pyramid"]
        adapted[path] = adapt_channels(np.asarray(parameters[path]), wanted.in_channels)
        notes.append(f"the first filters were adapted from {config.in_channels} to {wanted.in_channels} channels")
    if wanted.image_size != config.image_size:
        adapted |= _resized(parameters, config, wanted)
        sizes = [f"{height}x{width}" for height, width in (config.image_size, wanted.image_size)]
        notes.append(f"sentence positions were resized from images of {sizes[0]} to {sizes[1]}")
    if wanted.head != config.head:
        adapted = {path: value for path, value in adapted.items() if not path.startswith("decoder.")}
        adapted |= fresh_decoder(wanted, seed)
        notes.append(f"the head is {wanted.head}, and that of the checkpoint {config.head}")
    if wanted.num_classes != config.num_classes or wanted.head != config.head:
        for name in ("head.kernel", "head.bias"):
            adapted.pop(name, None)
        if wanted.head in DETECTORS:
            fresh = fresh_decoder(wanted, seed)
            changed = {path: new for path, new in fresh.items() if np.shape(adapted.get(path)) != new.shape}
            adapted |= changed
            if changed:
                notes.append(f"{len(changed)} arrays of the head {wanted.head} are new")
        elif wanted.num_classes:
            shape = (decoder_dim(wanted), wanted.num_classes)
            adapted["head.kernel"] = normal_init(None, shape, wanted.param_dtype).draw((seed,))
            adapted["head.bias"] = np.zeros(wanted.num_classes, adapted["head.kernel"].dtype)
            notes.append(
                f"the head is fresh: {wanted.num_classes} classes, where the checkpoint has {config.num_classes}"
            )
        else:
            notes.append(f"the head of {config.num_classes} classes was left out")
    return adapted, notes


def fresh_decoder(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """The initial parameters between the blocks and the last map of a head, each seeded by its path."""
    flat = nnx.to_flat_state(nnx.state(abstract_model(config)))
    paths = {".".join(map(str, path)): variable.get_value() for path, variable in flat if path[0] == "decoder"}
    return {path: undrawn.draw((seed, *path.encode())) for path, undrawn in paths.items()}


FIRST_FILTERS = ("word_embedding.conv.kernel", "stem.common.conv.kernel")
"""Of a TNT, and of a PyramidTNT."""


def adapt_channels(
    kernel: Float[np.ndarray, "height width channels filters"], channels: int
) -> Float[np.ndarray, "height width new_channels filters"]:
    """First filters for images of other channels, as timm adapts them.

    For one channel they are summed over the colours, for more they are repeated in their order and scaled: one channel,
    and multiples of three, that show the same grey give what the colours gave.

    Source: timm/models/_manipulate.py, adapt_input_conv.
    """
    there = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % there] * np.asarray(there / channels, kernel.dtype)


def select_classes(
    parameters: Mapping[str, np.ndarray | jax.Array], config: ModelConfig, classes: np.ndarray | None
) -> tuple[dict[str, np.ndarray], ModelConfig]:
    """The same model with a head of some of its classes, in this order, or with none."""
    chosen, part = dict(parameters), of_classes(config)
    for name in (f"{part.path}.kernel", f"{part.path}.bias"):
        value = np.asarray(chosen.pop(name))
        if classes is not None:
            each = value.reshape(*value.shape[:-1], part.groups, -1)
            kept = [*classes, *range(config.num_classes, each.shape[-1])]
            chosen[name] = each[..., kept].reshape(*value.shape[:-1], -1)
    return chosen, dataclasses.replace(config, num_classes=0 if classes is None else len(classes))


def _resized(
    parameters: Mapping[str, np.ndarray | jax.Array], config: ModelConfig, wanted: ModelConfig
) -> dict[str, np.ndarray]:
    resized = {}
    if config.sentence_positions:
        positions = parameters["sentence_positions"]
        resized["sentence_positions"] = resize_positions(positions, grid_size(config), grid_size(wanted))
    if config.architecture == "pyramid":
        grids = zip(stage_grids(config), stage_grids(wanted), SPATIAL_REDUCTION, strict=True)
        for stage, (grid, new_grid, reduction) in enumerate(grids):
            path, keys, new_keys = (
                f"stages.{stage}.position_bias",
                key_grid(grid, reduction),
                key_grid(new_grid, reduction),
            )
            resized[path] = resize_position_bias(parameters[path], (*grid, *keys), (*new_grid, *new_keys))
    return {path: np.asarray(value) for path, value in resized.items()}


def resize_position_bias(
    bias: Float[Array, "1 heads patches keys"], grids: tuple[int, int, int, int], new_grids: tuple[int, int, int, int]
) -> Float[Array, "1 heads new_patches new_keys"]:
    """The bias of every pair of places for other grids: bicubic with antialiasing over queries and keys.

    Args:
        grids: rows and columns of queries, then rows and columns of keys.
    """
    heads = bias.shape[1]
    maps = jax.image.resize(bias.reshape(heads, *grids), (heads, *new_grids), "cubic", antialias=True)
    return maps.reshape(1, heads, new_grids[0] * new_grids[1], new_grids[2] * new_grids[3])
