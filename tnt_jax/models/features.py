"""Maps of TNT at several scales, for detection and segmentation. PyramidTNT's `forward_intermediates` has them already.

The paper takes blocks 3, 6, 9 and 12 of TNT-S (counted from 1) into a feature pyramid network (Faster R-CNN, its table
13), up- and downsampled by transposed convolutions and a convolution to strides 4 to 32; its code was not published.
What is between two transposed convolutions is from the authors' description of PyramidTNT's detectors: batch norm,
GELU.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.functions import Keys
from tnt_jax.models.layers import BatchNorm, Linear, Rngs
from tnt_jax.models.stem import conv3x3


class Upsample(nnx.Module):
    """A transposed 2x2 convolution with stride 2: each place becomes a square of 2 x 2, without overlap."""

    def __init__(self, dim: int, *, config: ModelConfig, rngs: Rngs):
        self.linear = Linear(dim, 4 * dim, config=config, rngs=rngs)

    def __call__(self, maps: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch 2*rows 2*columns dim"]:
        batch, rows, columns, dim = maps.shape
        squares = self.linear(maps).reshape(batch, rows, columns, 2, 2, dim)
        return squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows, 2 * columns, dim)


class FeaturePyramid(nnx.Module):
    """Four maps of a TNT, all of one stride, to strides of a quarter, a half, once and twice it.

    TNT-S has stride 16, so of `model.forward_intermediates(images, (2, 5, 8, 11))` it makes strides 4, 8, 16 and 32.
    Its parameters are its own: those of the model stay as they are.

    Raises:
        InputError: the configuration is that of a PyramidTNT.
    """

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        if config.architecture == "pyramid":
            raise InputError(f"{config.name} has a pyramid of features in its stages: take its forward_intermediates")
        dim = config.outer_dim
        self.up4 = Upsample(dim, config=config, rngs=rngs)
        self.norm4 = BatchNorm(dim, config=config, rngs=rngs)
        self.up4_again = Upsample(dim, config=config, rngs=rngs)
        self.up8 = Upsample(dim, config=config, rngs=rngs)
        self.down32 = conv3x3(dim, dim, 2, config=config, rngs=rngs)

    def __call__(
        self, maps: Sequence[Float[Array, "batch rows columns dim"]], key: Keys | None = None
    ) -> list[Float[Array, "batch new_rows new_columns dim"]]:
        """The four maps, the finest first. With a key, as for the models, batch norm trains.

        Raises:
            InputError: there are not four maps.
        """
        if len(maps) != 4:
            raise InputError(f"there are {len(maps)} maps, and a feature pyramid is made of 4")
        quarter, half, same, double = (jnp.asarray(each) for each in maps)
        quarter = self.up4_again(nnx.gelu(self.norm4(self.up4(quarter), training=key is not None), approximate=False))
        return [quarter, self.up8(half), same, self.down32(double)]
