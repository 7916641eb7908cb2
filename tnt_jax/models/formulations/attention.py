"""The ways to compute attention between tokens.

- `reference`: the equations, softmax(q k^T / sqrt(head_dim)) v.
- `native`: one function in C for CPUs (kernels/cpu/attention.c), where XLA copies and transposes q, k and v.
- `cudnn`: one function of cuDNN's on NVIDIA GPUs in bfloat16, for whoever asks for the formulation `cuda`.
- `heads_first`: the equations on TPUs, with products that put every head where attention reads it.
"""

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.models.formulations.devices import gpu, on_each_device, platform
from tnt_jax.models.formulations.gradients import parameter_add, parameter_einsum, product, softmax
from tnt_jax.models.functions import Keys, dropout


def attention_kernel(layer: nnx.Module, batch: int, *, has_bias: bool, training: bool) -> Callable | None:
    """The function of tokens, a bias and the key of the weights' dropout that computes an `Attention`, for so many
    images; None where its equations do."""
    formulation = choose_attention(layer, batch, has_bias=has_bias, training=training)
    return None if formulation == "reference" else functools.partial(_run, formulation, layer)


def _run(
    formulation: str,
    layer: nnx.Module,
    x: Float[Array, "batch tokens dim"],
    bias: Float[Array, "1 heads queries keys"] | None,
    key: Keys | None,
) -> Float[Array, "batch tokens dim"]:
    if formulation == "native":
        from tnt_jax.models.kernels.cpu.attention import attention

        return layer.proj(on_each_device(functools.partial(attention, layer.num_heads), (0,), 0)(layer.qkv(x)))
    if formulation == "cudnn":
        return layer.proj(cudnn(layer.num_heads, layer.qkv(x)))
    query, keys, value = _heads_first(layer, x) if layer.one_input else layer.query_key_value(x)
    weights = dropout(attention_weights(query, keys, bias).astype(value.dtype), layer.attn_drop_rate, key)
    return _merge_heads_first(layer, product(weights, value))


def choose_attention(layer: nnx.Module, batch: int, *, has_bias: bool, training: bool) -> str:
    """The formulation of an `Attention` for so many images. The fallback is silent: only speed differs."""
    if layer.formulation == "reference" or layer.foreign_part():
        return "reference"
    if platform() == "tpu":
        return "heads_first"
    dropped = training and layer.attn_drop_rate
    if platform() == "gpu" and layer.formulation == "cuda":
        if layer.one_input and not has_bias and not dropped and not cudnn_obstacle(layer):
            return "cudnn"
    elif platform() == "cpu" and layer.formulation in ("auto", "native"):
        from tnt_jax.models.kernels.cpu.library import obstacle

        if layer.one_input and not has_bias and not dropped and not obstacle("attention", layer.qkv.dtype, batch):
            return "native"
    return "reference"


def cudnn_obstacle(layer: nnx.Module) -> str | None:
    """The reason why cuDNN cannot run this attention here, or None."""
    head_dim = layer.qkv.in_features // layer.num_heads
    if layer.qkv.dtype != "bfloat16" or head_dim % 8 or head_dim > 128:
        return f"cuDNN takes bfloat16 and heads of 8 to 128 channels in eights, and these are {head_dim}"
    card = gpu()
    if isinstance(card, str) or card[0] < 8.0:
        return f"cuDNN's attention needs compute capability 8.0, and this is {card}"
    is_here = any(device.platform == "gpu" for device in jax.devices())
    # JAX has no GPU without cuDNN. For one that is not here JAX 0.10's check of its version fails.
    if not is_here and (jax.__version_info__ < (0, 12) or not importlib.util.find_spec("nvidia.cudnn")):
        return "to compile cuDNN's attention without a GPU takes JAX 0.12 and nvidia-cudnn-cu13"
    return None


def cudnn(
    num_heads: int, qkv: Float[Array, "batch tokens qkv"], implementation: str = "cudnn", multiple: int = 8
) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v of q, k and v that lie side by side: (batch, tokens, dim).

    Tokens are padded to a `multiple`. JAX refuses the gradient for an odd number of them only beside a bias, which is
    not here; whether cuDNN takes it, and is faster without padding, benchmarks/gpu.py asks the first card.
    """
    batch, tokens, _ = qkv.shape
    padded = jnp.pad(qkv, ((0, 0), (0, -tokens % multiple), (0, 0)))
    heads = (each.reshape(batch, padded.shape[1], num_heads, -1) for each in jnp.split(padded, 3, axis=-1))
    lengths = jnp.full(batch, tokens, jnp.int32) if tokens % multiple else None
    attended = jax.nn.dot_product_attention(
        *heads, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
    )
    return attended[:, :tokens].reshape(batch, tokens, -1)


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
