"""Multi-head attention on CPUs, and its gradient: attention.c."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float

from tnt_jax.models.kernels.cpu import library


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(num_heads: int, qkv: Float[Array, "batch tokens qkv"]) -> Float[Array, "batch tokens dim"]:
    """softmax(q k^T / sqrt(head_dim)) v of float32 q, k and v that lie side by side, heads contiguous in each.

    For the gradient the weights are computed again; there are never more of them than those of a block of queries.
    """
    out = qkv[..., : qkv.shape[-1] // 3]
    return library.call("attention_forward", out, qkv, heads=np.int64(num_heads))


def _forward(num_heads: int, qkv: Array):
    return attention(num_heads, qkv), qkv


def _backward(num_heads: int, qkv: Array, cotangent: Array):
    return (library.call("attention_gradient", qkv, qkv, cotangent, heads=np.int64(num_heads)),)


attention.defvjp(_forward, _backward)
