"""The layers that the TNT family shares.

Linear and norms with the published constants, attention, MLP, transformer layer, stochastic depth.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_jax.config import ModelConfig
from tnt_jax.models.formulations.attention import attention_kernel, attention_weights
from tnt_jax.models.formulations.gradients import (
    LINEAR,
    gelu_of_platform,
    layer_norm,
    parameter_add,
    parameter_einsum,
    product,
)
from tnt_jax.models.formulations.inner import Kernel
from tnt_jax.models.formulations.outer import add_to_patches, outer_kernel
from tnt_jax.models.functions import NORM_EPSILON, Keys, drop_path, dropout, split_key

BATCH_NORM_MOMENTUM = 0.1  # of the new value, as PyTorch counts it


class AbstractRngs:
    """Stands in for `nnx.Rngs` where a module is made without numbers: its parameters are shapes that can be drawn."""

    def params(self) -> None:
        """No key."""


Rngs = nnx.Rngs | AbstractRngs
ABSTRACT = AbstractRngs()


class Undrawn(jax.ShapeDtypeStruct):
    """The shape of a parameter that knows how its initial values are drawn.

    JAX compiles what it draws shape by shape, ten seconds for a TNT-S. NumPy's values are there at once, and the same
    on every platform.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, draw: Callable):
        super().__init__(shape, dtype)
        self._draw = draw

    def draw(self, seed: Sequence[int]) -> np.ndarray:
        """The values; the same seed gives the same."""
        return self._draw(np.random.default_rng(seed), self.shape).astype(self.dtype)


def initializer(draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> Callable:
    """A Flax initialiser, from a function of a NumPy generator and a shape.

    A key of JAX seeds the generator with its bits, also where the key is traced; without a key the result is `Undrawn`.
    """

    def init(key: Keys | None, shape: tuple[int, ...], dtype: DTypeLike, **_):
        undrawn = Undrawn(shape, jnp.dtype(dtype), draw)
        if key is None:
            return undrawn
        bits = jax.random.key_data(key)

        def from_bits(bits: Array) -> np.ndarray:
            return undrawn.draw(np.asarray(bits).tolist())

        if isinstance(bits, jax.core.Tracer):
            drawn = jax.ShapeDtypeStruct(shape, undrawn.dtype)
            return jax.pure_callback(from_bits, drawn, bits, vmap_method="sequential")
        return jnp.asarray(from_bits(bits))

    return init


# torch's trunc_normal_(std=.02) cuts at an absolute 2, a hundred standard deviations away: a plain normal distribution.
normal_init = initializer(lambda rng, shape: 0.02 * rng.standard_normal(shape, np.float32))
zeros_init = initializer(lambda rng, shape: np.zeros(shape, np.float32))
ones_init = initializer(lambda rng, shape: np.ones(shape, np.float32))


def fan_in_uniform(fan_in: int) -> Callable:
    """PyTorch's default for a convolution's kernel and bias: uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return initializer(lambda rng, shape: rng.uniform(-bound, bound, shape).astype(np.float32))


class Linear(nnx.Linear):
    """A linear map of the last axis, initialised as published: weights with standard deviation 0.02 where nothing else
    is said, zero bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Callable = normal_init,
        config: ModelConfig,
        rngs: Rngs,
    ):
        self.plain = config.inner == "reference"
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=zeros_init,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*leading inputs"]) -> Float[Array, "*leading outputs"]:
        # XLA's CPU backend has a fast path for the weight gradient of a matrix product, and only for two axes.
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        out = parameter_einsum("ni,io->no", rows, self.kernel[...], plain=self.plain)
        out = out if self.bias is None else parameter_add(out, self.bias[...], plain=self.plain)
        return out.reshape(*x.shape[:-1], -1)


class LayerNorm(nnx.LayerNorm):
    """Normalises the last axis with statistics in float32 and the epsilon of the published models, 1e-5."""

    def __init__(self, num_features: int, *, config: ModelConfig, rngs: Rngs):
        self.plain = config.inner == "reference"
        super().__init__(
            num_features,
            epsilon=NORM_EPSILON,
            scale_init=ones_init,
            bias_init=zeros_init,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*leading channels"]) -> Float[Array, "*leading channels"]:
        return layer_norm(x.astype(self.dtype), self.scale[...], self.bias[...], NORM_EPSILON, plain=self.plain)


class BatchNorm(nnx.Module):
    """Normalises every channel: by the statistics of the batch in training, by their running averages otherwise.

    As torch.nn.BatchNorm2d, whose running average has the unbiased variance. Under jit the statistics are those of the
    whole batch on however many devices it lies. Training overwrites `mean` and `var`, which no gradient reaches.
    """

    def __init__(self, num_features: int, *, config: ModelConfig, rngs: Rngs):
        self.dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.scale = nnx.Param(ones_init(rngs.params(), (num_features,), param_dtype))
        self.bias = nnx.Param(zeros_init(rngs.params(), (num_features,), param_dtype))
        self.mean = nnx.BatchStat(zeros_init(rngs.params(), (num_features,), jnp.float32))
        self.var = nnx.BatchStat(ones_init(rngs.params(), (num_features,), jnp.float32))

    def __call__(self, x: Float[Array, "*leading channels"], *, training: bool) -> Float[Array, "*leading channels"]:
        x = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if training:
            axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            mean, var = x.mean(axes), x.var(axes)
            self._update(self.mean, mean)
            self._update(self.var, var * count / max(count - 1, 1))
        scale = self.scale[...].astype(jnp.float32) * jax.lax.rsqrt(var + NORM_EPSILON)
        return ((x - mean) * scale + self.bias[...].astype(jnp.float32)).astype(self.dtype)

    @staticmethod
    def _update(running: nnx.BatchStat, new: Float[Array, " channels"]) -> None:
        kept = (1 - BATCH_NORM_MOMENTUM) * running[...]
        running[...] = jax.lax.stop_gradient(kept + BATCH_NORM_MOMENTUM * new)


def rematerialised(block: Callable, remat: str) -> Callable:
    """A block's function that keeps of its activations what `ModelConfig.remat` says."""
    if remat == "none":
        return block
    linear = jax.checkpoint_policies.save_only_these_names(LINEAR)
    return jax.checkpoint(block, policy=linear if remat == "linear" else None)


def foreign_part(**parts: tuple[nnx.Module, type]) -> str | None:
    """Says which part is not of its class, or None. Kernels read the parameters of the modules that this package makes,
    and would not call another, such as `nnx.LoRALinear`."""
    for name, (module, expected) in parts.items():
        if type(module) is not expected:
            return f"{name} is a {type(module).__name__}, which no kernel knows"
    return None


class Attention(nnx.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(head_dim)) v, without bias in q, k and v (equation 1).

    `qkv` holds the three projections side by side: columns [0, dim) are q, then k, then v, heads contiguous in each.
    How it is computed is chosen in formulations/attention.py.
    """

    one_input = True
    """True if q, k and v are made of the same tokens, so that one product makes them."""

    def __init__(self, dim: int, num_heads: int, *, config: ModelConfig, rngs: Rngs):
        self.num_heads = num_heads
        self.formulation = config.inner
        self.drop_rate, self.attn_drop_rate = config.drop_rate, config.attn_drop_rate
        self.qkv = Linear(dim, 3 * dim, use_bias=False, config=config, rngs=rngs)
        self.proj = Linear(dim, dim, config=config, rngs=rngs)

    @property
    def plain(self) -> bool:
        """True for gradients of JAX's own."""
        return self.formulation == "reference"

    def query_key_value(
        self, x: Float[Array, "batch tokens dim"]
    ) -> tuple[Float[Array, "batch heads _ head_dim"], ...]:
        """q, k and v, heads first."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        query, keys, value = qkv.transpose(2, 0, 3, 1, 4)
        return query, keys, value

    def merge_heads(self, attended: Float[Array, "batch heads tokens head_dim"]) -> Float[Array, "batch tokens dim"]:
        """The heads side by side, projected."""
        batch, _, tokens, _ = attended.shape
        return self.proj(attended.swapaxes(1, 2).reshape(batch, tokens, -1))

    def foreign_part(self) -> str | None:
        """A linear map that was put in the place of the one made here, or None."""
        return foreign_part(qkv=(self.qkv, Linear), proj=(self.proj, Linear))

    def weights(
        self, x: Float[Array, "batch tokens dim"], bias: Float[Array, "1 heads queries keys"] | None = None
    ) -> Float[Array, "batch heads queries keys"]:
        """The attention weights of each token, in float32; every row sums to one."""
        query, keys, _ = self.query_key_value(x)
        return attention_weights(query, keys, bias, plain=self.plain)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        key: Keys | None = None,
        bias: Float[Array, "1 heads queries keys"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Attention of `x` to itself; `bias` is added to the logits of the softmax."""
        weights_key, proj_key = split_key(key, 2)
        if kernel := attention_kernel(self, x.shape[0], has_bias=bias is not None, training=key is not None):
            return dropout(kernel(x, bias, weights_key), self.drop_rate, proj_key)
        query, keys, value = self.query_key_value(x)
        weights = attention_weights(query, keys, bias, plain=self.plain)
        weights = dropout(weights.astype(value.dtype), self.attn_drop_rate, weights_key)
        return dropout(self.merge_heads(product(weights, value, plain=self.plain)), self.drop_rate, proj_key)


class Mlp(nnx.Module):
    """Linear, exact GELU, linear (equation 2)."""

    def __init__(self, dim: int, *, config: ModelConfig, rngs: Rngs):
        hidden = int(dim * config.mlp_ratio)
        self.drop_rate = config.drop_rate
        self.fc1 = Linear(dim, hidden, config=config, rngs=rngs)
        self.fc2 = Linear(hidden, dim, config=config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], key: Keys | None = None
    ) -> Float[Array, "batch tokens dim"]:
        hidden_key, out_key = split_key(key, 2)
        hidden = dropout(gelu_of_platform(self.fc1(x)), self.drop_rate, hidden_key)
        return dropout(self.fc2(hidden), self.drop_rate, out_key)


class SqueezeExcitation(nnx.Module):
    """Channels scaled by what the mean over the tokens makes of them (table 12 of the paper).

    Source: SE in huawei's tnt.py. Norm, linear to a quarter, ReLU, linear, tanh.
    """

    def __init__(self, dim: int, *, config: ModelConfig, rngs: Rngs):
        self.norm = LayerNorm(dim, config=config, rngs=rngs)
        self.fc1 = Linear(dim, dim // 4, config=config, rngs=rngs)
        self.fc2 = Linear(dim // 4, dim, config=config, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        mean = x.mean(axis=1, keepdims=True)
        return x * jnp.tanh(self.fc2(nnx.relu(self.fc1(self.norm(mean)))))


class TransformerLayer(nnx.Module):
    """Pre-norm attention and MLP, each on a residual branch with stochastic depth. Both transformers of a TNT block are
    one.

    A branch is dropped for whole rows of the first axis.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path_rate: float,
        *,
        norm: Callable[..., nnx.Module] = LayerNorm,
        attention: Callable[..., nnx.Module] = Attention,
        squeeze_excitation: bool = False,
        config: ModelConfig,
        rngs: Rngs,
    ):
        self.drop_path_rate = drop_path_rate
        self.norms_each_token = norm is LayerNorm
        self.norm_class = norm
        self.norm1 = norm(dim, config=config, rngs=rngs)
        self.attn = attention(dim, num_heads, config=config, rngs=rngs)
        self.norm2 = norm(dim, config=config, rngs=rngs)
        self.mlp = Mlp(dim, config=config, rngs=rngs)
        self.se = SqueezeExcitation(dim, config=config, rngs=rngs) if squeeze_excitation else None

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        key: Keys | None = None,
        bias: Float[Array, "1 heads queries keys"] | None = None,
        added: Float[Array, "batch patches dim"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """`bias` is added to the logits of the softmax; `added` first of all to the patches, the last tokens."""
        if kernel := self.kernel_for(x.shape, has_bias=bias is not None, training=key is not None):
            return kernel(x, key, added)
        x = x if added is None else add_to_patches(x, added)
        attn_key, attn_path_key, mlp_key, mlp_path_key = split_key(key, 4)
        x = x + drop_path(self.attn(self.norm1(x), attn_key, bias), self.drop_path_rate, attn_path_key)
        change = self.mlp(self.norm2(x), mlp_key)
        change = change if self.se is None else change + self.se(change)
        return x + drop_path(change, self.drop_path_rate, mlp_path_key)

    def kernel_for(self, shape: tuple[int, int, int], *, has_bias: bool, training: bool) -> Kernel | None:
        """The function that computes this layer for tokens of a shape; None where the equations above do."""
        return outer_kernel(self, shape, has_bias=has_bias, training=training)

    def foreign_part(self) -> str | None:
        """The reason why no kernel can compute this layer: a part in the place of the one made here, or None."""
        norm, mlp = self.norm_class, self.mlp
        return (
            foreign_part(
                norm1=(self.norm1, norm), attn=(self.attn, Attention), norm2=(self.norm2, norm), mlp=(mlp, Mlp)
            )
            or self.attn.foreign_part()
            or foreign_part(fc1=(mlp.fc1, Linear), fc2=(mlp.fc2, Linear))
        )

    def attention_weights(
        self, x: Float[Array, "batch tokens dim"], bias: Float[Array, "1 heads queries keys"] | None = None
    ) -> Float[Array, "batch heads queries keys"]:
        """The attention weights that this layer uses on input `x`, in float32."""
        return self.attn.weights(self.norm1(x), bias)


def resize_positions(
    positions: Float[Array, "1 tokens dim"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "1 new_tokens dim"]:
    """Positions of a grid of sentences for another grid: bicubic with antialiasing. A class token before it is kept.

    Source: timm/layers/pos_embed.py, resample_abs_pos_embed.
    """
    dim, others = positions.shape[-1], positions.shape[1] - grid[0] * grid[1]
    maps = positions[:, others:].reshape(1, *grid, dim)
    maps = jax.image.resize(maps, (1, *new_grid, dim), "cubic", antialias=True)
    return jnp.concatenate([positions[:, :others], maps.reshape(1, -1, dim)], axis=1)
