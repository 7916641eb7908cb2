"""The passes that compilers are asked about: a ViT-S of stock layers, our DeiT-S, or a TNT-S, forward or trained."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from deit import DeiT
from flax import nnx
from stock_vit import StockViT

from tnt_jax.config import ModelConfig
from tnt_jax.models.layers import ABSTRACT
from tnt_jax.models.variants import abstract_model


def traced(model: str, config: ModelConfig, batch: int, which: str) -> tuple[Callable, tuple]:
    """A function and the shapes of its arguments: "forward", or "train" for the gradient of the parameters.

    Args:
        model: stock, deit, or any other name for the network of the configuration.
    """
    if model == "stock":
        network = nnx.eval_shape(lambda: StockViT(config, rngs=nnx.Rngs(0)))
    else:
        network = DeiT(config, rngs=ABSTRACT) if model == "deit" else abstract_model(config)
    graphdef, params = nnx.split(network)
    images = jax.ShapeDtypeStruct((batch, *config.image_size, 3), jnp.bfloat16)

    def forward(params, images, key=None):
        return nnx.merge(graphdef, params)(images, key)

    def train(params, images, seed):
        key = jax.random.wrap_key_data(seed)
        return jax.grad(lambda params: jax.nn.logsumexp(forward(params, images, key), axis=-1).sum())(params)

    shapes = (params, images) if which == "forward" else (params, images, jax.ShapeDtypeStruct((2,), jnp.uint32))
    return {"forward": forward, "train": train}[which], shapes
