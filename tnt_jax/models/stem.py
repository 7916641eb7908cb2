"""PyramidTNT's stem: convolutions with batch norm that make words and sentences of an image.

Source: huawei-noah/Efficient-AI-Backbones, tnt_pytorch/pyramid_tnt.py.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.config import ModelConfig
from tnt_jax.models.calling import Images
from tnt_jax.models.layers import BatchNorm, Rngs, initializer, zeros_init
from tnt_jax.models.tnt import to_patches

PATCH_SIZE, WORD_STRIDE, WORDS_PER_SIDE = 8, 2, 4
"""The stem halves the image once for words and cuts 4 x 4 words for each sentence."""


def conv3x3(inputs: int, outputs: int, stride: int, *, config: ModelConfig, rngs: Rngs) -> nnx.Conv:
    """A 3x3 convolution with a border of zeros, initialised as published: He's normal distribution over the fan out."""
    return nnx.Conv(
        inputs,
        outputs,
        (3, 3),
        strides=stride,
        padding=1,
        kernel_init=initializer(lambda rng, shape: (2 / (9 * outputs)) ** 0.5 * rng.standard_normal(shape, np.float32)),
        bias_init=zeros_init,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


class ConvNormRelu(nnx.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, config: ModelConfig, rngs: Rngs):
        self.conv = conv3x3(inputs, outputs, stride, config=config, rngs=rngs)
        self.norm = BatchNorm(outputs, config=config, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width inputs"], *, training: bool) -> Array:
        return nnx.relu(self.norm(self.conv(x), training=training))


class Stem(nnx.Module):
    """Image to words at half its resolution and sentences at an eighth, by convolutions that they share at first."""

    def __init__(self, *, config: ModelConfig, rngs: Rngs):
        dim = config.inner_dim
        conv = functools.partial(ConvNormRelu, config=config, rngs=rngs)
        self.common = conv(config.in_channels, 2 * dim, 2)
        self.words = conv(2 * dim, dim, 1)
        self.sentences1 = conv(2 * dim, 4 * dim, 2)
        self.sentences2 = conv(4 * dim, 8 * dim, 2)
        self.sentences3 = conv(8 * dim, config.outer_dim, 1)

    def __call__(
        self, images: Images, *, training: bool
    ) -> tuple[Float[Array, "sentences words inner"], Float[Array, "batch patches outer"]]:
        x = self.common(jnp.asarray(images), training=training)
        words = to_patches(self.words(x, training=training), WORDS_PER_SIDE)
        for conv in (self.sentences1, self.sentences2, self.sentences3):
            x = conv(x, training=training)
        return words.reshape(words.shape[0], -1, words.shape[-1]), x.reshape(x.shape[0], -1, x.shape[-1])
