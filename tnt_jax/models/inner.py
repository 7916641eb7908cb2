"""The inner transformer, which relates the words of one patch."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from tnt_jax.config import ModelConfig
from tnt_jax.models.formulations.inner import Kernel, inner_kernel
from tnt_jax.models.layers import LayerNorm, Rngs, TransformerLayer


class InnerTransformer(TransformerLayer):
    """Equations 6 and 7 of the paper: a transformer layer on the words of each patch, all patches of all images side by
    side.

    The words of a patch are one row, so stochastic depth drops a branch per patch, as the published code does.
    It reads as every transformer layer; formulations/inner.py has the functions that compute it as a whole.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path_rate: float,
        *,
        norm: Callable[..., nnx.Module] = LayerNorm,
        config: ModelConfig,
        rngs: Rngs,
    ):
        super().__init__(dim, num_heads, drop_path_rate, norm=norm, config=config, rngs=rngs)
        self.formulation = config.inner
        self.dtype = jnp.dtype(config.dtype)
        self.has_dropout = bool(config.drop_rate or config.attn_drop_rate)

    def kernel_for(self, shape: tuple[int, int, int], *, has_bias: bool, training: bool) -> Kernel | None:
        return inner_kernel(self, shape, training=training)
