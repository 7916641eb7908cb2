"""Parameters of one model for another that takes images of another size, or has other classes."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.layers import normal_init, resize_positions
from tnt_jax.models.tnt import grid_size

# What of a configuration says nothing of the parameters, or what `adapt` knows how to change.
_FREE = {"name", "image_size", "num_classes", "drop_rate", "attn_drop_rate", "drop_path_rate"}
_FREE |= {"dtype", "param_dtype", "remat"}


def adapt(
    parameters: Mapping[str, np.ndarray], config: ModelConfig, wanted: ModelConfig, *, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Sentence positions are resized to another image size, another number of classes gets a fresh head.

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
    if wanted.image_size != config.image_size:
        positions = resize_positions(parameters["sentence_positions"], grid_size(config), grid_size(wanted))
        adapted["sentence_positions"] = np.asarray(positions)
        sizes = [f"{height}x{width}" for height, width in (config.image_size, wanted.image_size)]
        notes.append(f"sentence positions were resized from images of {sizes[0]} to {sizes[1]}")
    if wanted.num_classes != config.num_classes:
        for name in ("head.kernel", "head.bias"):
            adapted.pop(name, None)
        if wanted.num_classes:
            shape = (wanted.outer_dim, wanted.num_classes)
            adapted["head.kernel"] = np.asarray(normal_init(np.random.default_rng(seed), shape, wanted.param_dtype))
            adapted["head.bias"] = np.zeros(wanted.num_classes, adapted["head.kernel"].dtype)
            notes.append(
                f"the head is fresh: {wanted.num_classes} classes, where the checkpoint has {config.num_classes}"
            )
        else:
            notes.append(f"the head of {config.num_classes} classes was left out")
    return adapted, notes
