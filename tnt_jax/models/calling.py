"""The call of a model: the images that it takes, and the source of randomness in training."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Num

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.formulations.devices import AUTO_MESH, has_explicit_axes
from tnt_jax.models.functions import Keys

Images = Num[Array | np.ndarray, "batch height width channels"]
"""Normalised images, in floating point; anything else is refused with a message."""


def check_images(images: Images, config: ModelConfig) -> None:
    """Raises InputError unless the images are normalised and have the shape that the model was made for."""
    expected = (*config.image_size, config.in_channels)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise InputError(
            f"images have shape {images.shape}, and this model takes (batch, {', '.join(map(str, expected))})"
        )
    if not images.shape[0]:
        raise InputError(f"images have shape {images.shape}, and a batch has at least one image")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images are {images.dtype} pixels; normalise them, for example (pixels / 255 - 0.5) / 0.5")
    if has_explicit_axes(images):
        raise InputError(f"the mesh has axes of the type Explicit, JAX's default; make it with {AUTO_MESH}")


def training_key(model: nnx.Module, key: Keys | None, rngs: nnx.Rngs | None) -> Keys | None:
    """The key that a call trains with, or None where it evaluates.

    `model.train()` and `model.eval()` set `model.deterministic`, as for every module of Flax. Before either is called
    it is None, and the call decides: with a key or `rngs` it trains.

    Raises:
        InputError: both a key and `rngs` are given, or neither after `model.train()`.
    """
    if key is not None and rngs is not None:
        raise InputError("a call takes a key or rngs, and got both")
    if model.deterministic:
        return None
    key = rngs.dropout() if rngs is not None else key
    if key is None and model.deterministic is False:
        raise InputError(
            "after model.train() a call needs randomness: model(images, key) or model(images, rngs=rngs). "
            "model.eval() ends training"
        )
    return key


def explains_forward_mode(method: Callable) -> Callable:
    """A method of a model whose error in forward mode, as of `jax.jvp`, says what to do.

    Inside of `jax.jit` the error is JAX's own, "can't apply forward-mode autodiff (jvp) to a custom_vjp function".
    """

    @functools.wraps(method)
    def call(*arguments, **options):
        try:
            return method(*arguments, **options)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise InputError(
                'forward-mode derivatives (jax.jvp, jax.hessian) need a model that was made with inner="reference": '
                "the other formulations have gradients of their own"
            ) from error

    return call


def block_indices(blocks: Sequence[int], depth: int) -> set[int]:
    """Indices of blocks as numbers from 0; -1 is the last one.

    Raises:
        InputError: there is no such block.
    """
    if outside := [index for index in blocks if not -depth <= index < depth]:
        raise InputError(f"blocks {outside} are out of range: this model has blocks 0 to {depth - 1}")
    return {index % depth for index in blocks}
