"""State dicts with the names and shapes of the published ones, and made-up values."""

import numpy as np
import published
import safetensors.numpy
import torch

from tnt_jax.models.variants import model_config
from tnt_jax.storage.folder import parameter_shapes
from tnt_jax.storage.torch.layouts import layout_shapes


def state_dict(layout, name, **changes):
    shapes = {path: of.shape for path, of in parameter_shapes(model_config(name=name, **changes)).items()}
    return {name: published.tensor(name, shape, seed=0) for name, shape in layout_shapes(shapes, layout).items()}


def as_torch(tensors):
    return {name: torch.tensor(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()}


def save_safetensors(tensors, path):
    safetensors.numpy.save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path
