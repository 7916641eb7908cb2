"""DeiT-S (arXiv 2012.12877) from the layers of TNT: what a TNT-S is without its words, the yardstick for their price.

Unlike the published one it has no bias in q, k and v, as TNT has none; that changes nothing that could be measured.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tnt_jax.config import ModelConfig
from tnt_jax.models.functions import split_key
from tnt_jax.models.layers import LayerNorm, Linear, TransformerLayer, normal_init
from tnt_jax.models.tnt import drop_path_rates, grid_size, make_head, to_patches


class DeiT(nnx.Module):
    """The sentences of the TNT of the same configuration, embedded straight from the pixels of their patches."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows, columns = grid_size(config)
        dim, param_dtype = config.outer_dim, jnp.dtype(config.param_dtype)
        self.patch_embedding = Linear(config.patch_size**2 * config.in_channels, dim, config=config, rngs=rngs)
        self.class_token = nnx.Param(normal_init(rngs.params(), (1, 1, dim), param_dtype))
        self.positions = nnx.Param(normal_init(rngs.params(), (1, 1 + rows * columns, dim), param_dtype))
        self.blocks = nnx.List(
            [
                TransformerLayer(dim, config.outer_heads, rate, config=config, rngs=rngs)
                for rate in drop_path_rates(config.drop_path_rate, config.depth)
            ]
        )
        self.norm = LayerNorm(dim, config=config, rngs=rngs)
        self.head = make_head(dim, config=config, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch classes"]:
        dtype, batch = jnp.dtype(self.config.dtype), images.shape[0]
        patches = to_patches(images.astype(dtype), self.config.patch_size)
        sentences = self.patch_embedding(patches.reshape(batch, -1, patches[0].size))
        class_tokens = jnp.broadcast_to(self.class_token[...].astype(dtype), (batch, 1, self.config.outer_dim))
        sentences = jnp.concatenate([class_tokens, sentences], axis=1) + self.positions[...].astype(dtype)
        for block, block_key in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            sentences = block(sentences, block_key)
        return self.head(self.norm(sentences)[:, 0].astype(jnp.float32))
