"""ViT-S/16 (arXiv 2010.11929) of Flax's own layers: what others would use, the yardstick beside our DeiT-S.

The plainest code: no custom gradient, no kernel, no stochastic depth. q, k and v are `nnx.MultiHeadAttention`'s, whose
softmax is in the dtype of the network.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tnt_jax.config import ModelConfig


class StockLayer(nnx.Module):
    """Pre-norm attention and MLP, each on a residual branch."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads, dim, decode=False, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class StockViT(nnx.Module):
    """As many blocks, heads and channels as the outer transformer of the TNT of the same configuration."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, dtype, size = config.outer_dim, jnp.dtype(config.dtype), config.patch_size
        height, width = config.image_size
        tokens = 1 + (height // size) * (width // size)
        self.dtype = dtype
        self.patch_embedding = nnx.Conv(
            config.in_channels, dim, (size, size), strides=size, padding="VALID", dtype=dtype, rngs=rngs
        )
        self.class_token = nnx.Param(jnp.zeros((1, 1, dim)))
        self.positions = nnx.Param(0.02 * rngs.params.normal((1, tokens, dim)))
        hidden = int(dim * config.mlp_ratio)
        self.blocks = nnx.List(
            [StockLayer(dim, config.outer_heads, hidden, dtype, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(dim, config.num_classes, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits. A key is taken, as by our models, and not used: nothing here is random."""
        batch = images.shape[0]
        patches = self.patch_embedding(images).reshape(batch, -1, self.patch_embedding.out_features)
        class_tokens = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (batch, 1, patches.shape[-1]))
        x = jnp.concatenate([class_tokens, patches], axis=1) + self.positions[...].astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0].astype(jnp.float32))
