"""A TNT and a PyramidTNT that are small enough to be computed in a moment, with random parameters."""

import numpy as np

from tnt_jax.models.variants import model_config
from tnt_jax.storage.folder import model_from_parameters, parameter_shapes

SMALL_PYRAMID = {
    "name": "ptnt_ti_patch16_192",
    "image_size": 32,
    "num_classes": 3,
    "depth": (1, 1, 1, 1),
    "inner_dim": (2, 4, 4, 4),
    "inner_heads": (1, 2, 2, 2),
    "outer_dim": (8, 12, 16, 16),
    "outer_heads": (2, 2, 2, 2),
}


def small_model(**changes):
    sizes = {"depth": 1, "inner_dim": 4, "inner_heads": 2, "outer_dim": 12, "outer_heads": 3}
    return random_model(**{"name": "tnt_ti_patch16_224", "image_size": 32, "num_classes": 3, **sizes, **changes})


def small_pyramid(**changes):
    return random_model(**SMALL_PYRAMID | changes)


def random_model(**fields):
    config = model_config(**fields)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return model_from_parameters(config, {path: _random(rng, path, of.shape) for path, of in shapes.items()})


def _random(rng, path, shape):
    return abs(rng.normal(size=shape)) + 0.5 if path.endswith(".var") else rng.normal(size=shape)
