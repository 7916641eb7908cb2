"""A TNT that is small enough to be computed in a moment, with random parameters."""

import numpy as np

from tnt_jax.config import ModelConfig
from tnt_jax.models.saving import model_from_parameters, parameter_shapes


def small_model(**changes):
    sizes = {"image_size": 32, "num_classes": 3, "depth": 1, "inner_dim": 4, "inner_heads": 2, "outer_dim": 12}
    config = ModelConfig(name="tnt_ti_patch16_224", **{**sizes, "outer_heads": 3, **changes})
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return model_from_parameters(config, {path: rng.normal(size=of.shape) for path, of in shapes.items()})
