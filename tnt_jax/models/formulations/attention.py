"""How attention between tokens is computed.

- `reference`: the equations, softmax(q k^T / sqrt(head_dim)) v.
- `native`: one function in C for CPUs (kernels/cpu/attention.c), where XLA copies and transposes q, k and v.
- `heads_first`: the equations on TPUs, with products that put every head where attention reads it.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tnt_jax.models.formulations.devices import on_each_device, platform
from tnt_jax.models.formulations.gradients import parameter_add, parameter_einsum, product, softmax
from tnt_jax.models.functions import dropout


def attend(
    layer: nnx.Module,
    x: Float[Array, "batch tokens dim"],
    bias: Float[Array, "1 heads queries keys"] | None,
    key: PRNGKeyArray | None,
) -> Float[Array, "batch tokens dim"]:
    """What an `Attention` makes of tokens; `key` is for the dropout of the attention weights."""
    formulation = choose(layer, x.shape[0], has_bias=bias is not None, training=key is not None)
    if formulation == "native":
        from tnt_jax.models.kernels.cpu.attention import attention

        return layer.proj(on_each_device(functools.partial(attention, layer.num_heads), (0,), 0)(layer.qkv(x)))
    heads_first = formulation == "heads_first"
    query, keys, value = _heads_first(layer, x) if heads_first and layer.one_input else layer.query_key_value(x)
    plain = layer.formulation == "reference"
    weights = dropout(attention_weights(query, keys, bias, plain=plain).astype(value.dtype), layer.attn_drop_rate, key)
    attended = product(weights, value, plain=plain)
    return _merge_heads_first(layer, attended) if heads_first else layer.merge_heads(attended)


def choose(layer: nnx.Module, batch: int, *, has_bias: bool, training: bool) -> str:
    """The formulation of an `Attention` for so many images. The fallback is silent: only speed differs."""
    if layer.formulation == "reference":
        return "reference"
    if platform() == "tpu":
        return "heads_first"
    if platform() == "cpu" and layer.formulation in ("auto", "native"):
        from tnt_jax.models.kernels.cpu.library import obstacle

        dropped = training and layer.attn_drop_rate
        if layer.one_input and not has_bias and not dropped and not obstacle("attention", layer.qkv.dtype, batch):
            return "native"
    return "reference"


def attention_weights(
    query: Float[Array, "batch heads queries head_dim"],
    keys: Float[Array, "batch heads keys head_dim"],
    bias: Float[Array, "1 heads queries keys"] | None,
    *,
    plain: bool = False,
) -> Float[Array, "batch heads queries keys"]:
    """softmax(q k^T / sqrt(head_dim) + bias) in float32."""
    logits = product(query * query.shape[-1] ** -0.5, keys.mT, jnp.float32, plain=plain)
    return softmax(logits if bias is None else logits + bias, plain=plain)


def _heads_first(
    layer: nnx.Module, x: Float[Array, "batch tokens dim"]
) -> tuple[Float[Array, "batch heads tokens head_dim"], ...]:
    """q, k and v of a product each. One product for all would be transposed forth and back, a fifth of a train step."""
    kernels = layer.qkv.kernel[...].reshape(x.shape[-1], 3, layer.num_heads, -1)
    return tuple(parameter_einsum("bnd,dhe->bhne", x, kernels[:, part]) for part in range(3))


def _merge_heads_first(
    layer: nnx.Module, attended: Float[Array, "batch heads tokens head_dim"]
) -> Float[Array, "batch tokens dim"]:
    kernel = layer.proj.kernel[...].reshape(layer.num_heads, -1, layer.proj.out_features)
    return parameter_add(parameter_einsum("bhne,hed->bnd", attended, kernel), layer.proj.bias[...])
