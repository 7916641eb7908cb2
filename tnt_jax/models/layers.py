"""What the TNT family shares.

Linear and norm with the published constants, attention, MLP, transformer layer, stochastic depth.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tnt_jax.config import ModelConfig

LAYER_NORM_EPSILON = 1e-5  # PyTorch's default, which every published TNT uses; Flax's is 1e-6

# torch's trunc_normal_(std=.02) cuts at an absolute 2, a hundred standard deviations away: a plain normal distribution.
normal_init = nnx.initializers.normal(stddev=0.02)


class InitKeys:
    """Stands in for `nnx.Rngs` where a module is made: all that the modules ask of it is the next key.

    Rngs counts in a Variable, and to change a Variable while a module is traced takes ten times as long as all the
    rest.
    """

    def __init__(self, seed: int):
        self._key, self._count = jax.random.key(seed), 0

    def params(self) -> PRNGKeyArray:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def fan_in_uniform(fan_in: int) -> nnx.Initializer:
    """PyTorch's default for a convolution's kernel and bias: uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nnx.Linear):
    """A linear map of the last axis, initialised as published: weights with standard deviation 0.02, zero bias."""

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool = True, config: ModelConfig, rngs: nnx.Rngs
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=normal_init,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*leading inputs"]) -> Float[Array, "*leading outputs"]:
        # XLA's CPU backend has a fast path for the weight gradient of a matrix product, and only for two axes.
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class LayerNorm(nnx.LayerNorm):
    """Normalises the last axis with statistics in float32 and the epsilon of the published models, 1e-5."""

    def __init__(self, num_features: int, *, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(
            num_features,
            epsilon=LAYER_NORM_EPSILON,
            # E[x^2] - E[x]^2 loses digits that the golden records have.
            use_fast_variance=False,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )


def dropout(x: Array, rate: float, key: PRNGKeyArray | None, *, mask_shape: tuple[int, ...] | None = None) -> Array:
    """Zeroes elements of `x` with probability `rate` and scales the others by 1 / (1 - rate); without a key, returns
    `x`.

    `mask_shape` (default: that of `x`) is broadcast: elements that share an entry of it are dropped together.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, mask_shape or x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def drop_path(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Stochastic depth.

    Drops a residual branch for whole rows of the first axis (an image, or a patch in the inner transformer).
    """
    return dropout(x, rate, key, mask_shape=(x.shape[0],) + (1,) * (x.ndim - 1))


def split_key(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    """`count` independent keys, or as many None when there is no randomness to pass on."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class Attention(nnx.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(head_dim)) v, without bias in q, k and v (equation 1).

    `qkv` holds the three projections side by side: columns [0, dim) are q, then k, then v, heads contiguous in each.
    """

    def __init__(self, dim: int, num_heads: int, *, config: ModelConfig, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.drop_rate, self.attn_drop_rate = config.drop_rate, config.attn_drop_rate
        self.qkv = Linear(dim, 3 * dim, use_bias=False, config=config, rngs=rngs)
        self.proj = Linear(dim, dim, config=config, rngs=rngs)

    def _qkv(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "3 batch heads tokens head_dim"]:
        batch, tokens, dim = x.shape
        return self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).transpose(2, 0, 3, 1, 4)

    def weights(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch heads queries keys"]:
        """What each token attends to, in float32; every row sums to one."""
        query, key, _ = self._qkv(x)
        return self._softmax(query, key)

    @staticmethod
    def _softmax(query: Array, key: Array) -> Float[Array, "batch heads queries keys"]:
        scale = query.shape[-1] ** -0.5
        logits = jnp.einsum("bhqd,bhkd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits, axis=-1)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch tokens dim"]:
        weights_key, proj_key = split_key(key, 2)
        query, keys, value = self._qkv(x)
        weights = dropout(self._softmax(query, keys).astype(value.dtype), self.attn_drop_rate, weights_key)
        attended = jnp.einsum("bhqk,bhkd->bqhd", weights, value).reshape(x.shape)
        return dropout(self.proj(attended), self.drop_rate, proj_key)


class Mlp(nnx.Module):
    """Linear, exact GELU, linear (equation 2)."""

    def __init__(self, dim: int, *, config: ModelConfig, rngs: nnx.Rngs):
        hidden = int(dim * config.mlp_ratio)
        self.drop_rate = config.drop_rate
        self.fc1 = Linear(dim, hidden, config=config, rngs=rngs)
        self.fc2 = Linear(hidden, dim, config=config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch tokens dim"]:
        hidden_key, out_key = split_key(key, 2)
        hidden = dropout(nnx.gelu(self.fc1(x), approximate=False), self.drop_rate, hidden_key)
        return dropout(self.fc2(hidden), self.drop_rate, out_key)


class TransformerLayer(nnx.Module):
    """Pre-norm attention and MLP, each on a residual branch with stochastic depth. Both transformers of a TNT block are
    one.

    A branch is dropped for whole rows of the first axis.
    """

    def __init__(self, dim: int, num_heads: int, drop_path_rate: float, *, config: ModelConfig, rngs: nnx.Rngs):
        self.drop_path_rate = drop_path_rate
        self.norm1 = LayerNorm(dim, config=config, rngs=rngs)
        self.attn = Attention(dim, num_heads, config=config, rngs=rngs)
        self.norm2 = LayerNorm(dim, config=config, rngs=rngs)
        self.mlp = Mlp(dim, config=config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch tokens dim"]:
        attn_key, attn_path_key, mlp_key, mlp_path_key = split_key(key, 4)
        x = x + drop_path(self.attn(self.norm1(x), attn_key), self.drop_path_rate, attn_path_key)
        x = x + drop_path(self.mlp(self.norm2(x), mlp_key), self.drop_path_rate, mlp_path_key)
        return x

    def attention_weights(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch heads queries keys"]:
        """The attention weights that this layer uses on input `x`, in float32."""
        return self.attn.weights(self.norm1(x))


def resize_positions(
    positions: Float[Array, "1 1+patches dim"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "1 1+new_patches dim"]:
    """Sentence positions for another number of rows and columns: bicubic with antialiasing, the class token's kept.

    Source: timm/layers/pos_embed.py, resample_abs_pos_embed.
    """
    class_token, patches = positions[:, :1], positions[:, 1:]
    dim = positions.shape[-1]
    maps = patches.reshape(1, *grid, dim)
    maps = jax.image.resize(maps, (1, *new_grid, dim), "cubic", antialias=True)
    return jnp.concatenate([class_token, maps.reshape(1, -1, dim)], axis=1)
