"""A model's parameters for images of another size."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from tnt_jax.config import ModelConfig
from tnt_jax.models.layers import resize_positions
from tnt_jax.models.pyramid_tnt import SPATIAL_REDUCTION, key_grid, stage_grids
from tnt_jax.models.tnt import grid_size


def resize_parameters(parameters: Mapping[str, Any], config: ModelConfig, new_config: ModelConfig) -> dict[str, Any]:
    """Parameters by their dotted path, with all that knows of places resized from one image size to another.

    These are the positions of sentences, and the position biases of a PyramidTNT. At the same size nothing changes.

    Args:
        config: of the parameters, resolved.
        new_config: what they are wanted for, resolved; it differs in nothing but `image_size`.
    """
    resized = dict(parameters)
    if config.image_size == new_config.image_size:
        return resized
    if config.sentence_positions:
        positions = resized["sentence_positions"]
        resized["sentence_positions"] = resize_positions(positions, grid_size(config), grid_size(new_config))
    if config.architecture == "pyramid":
        grids = zip(stage_grids(config), stage_grids(new_config), SPATIAL_REDUCTION, strict=True)
        for stage, (grid, new_grid, reduction) in enumerate(grids):
            keys, new_keys = key_grid(grid, reduction), key_grid(new_grid, reduction)
            path = f"stages.{stage}.position_bias"
            resized[path] = resize_position_bias(resized[path], (*grid, *keys), (*new_grid, *new_keys))
    return resized


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
