"""The inner transformer layer on CPUs, and its gradient: inner_layer.c."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tnt_jax.models.kernels import on_cpu


class Parameters(NamedTuple):
    """Of a layer, float32, as its modules hold them: matrices multiply from the right."""

    norm1_scale: Float[Array, " normed"]
    norm1_bias: Float[Array, " normed"]
    qkv: Float[Array, "channels 3*channels"]
    proj: Float[Array, "channels channels"]
    proj_bias: Float[Array, " channels"]
    norm2_scale: Float[Array, " normed"]
    norm2_bias: Float[Array, " normed"]
    fc1: Float[Array, "channels hidden"]
    fc1_bias: Float[Array, " hidden"]
    fc2: Float[Array, "hidden channels"]
    fc2_bias: Float[Array, " channels"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def inner_layer(
    num_heads: int,
    epsilon: float,
    words: Float[Array, "sentences words channels"],
    survival: Float[Array, "2 sentences"],
    parameters: Parameters,
) -> Float[Array, "sentences words channels"]:
    """The layer on float32 words; `survival` is what stochastic depth multiplies the two branches of a sentence by.

    A norm whose scale has as many numbers as a word has channels normalises each word, else all words of a sentence.
    For the gradient the layer is computed again, from the words that it was given.
    """
    attributes = {"heads": np.int64(num_heads), "epsilon": np.float32(epsilon)}
    return on_cpu.call("inner_layer_forward", words, words, survival, *parameters, **attributes)


def _forward(num_heads: int, epsilon: float, *arrays):
    return inner_layer(num_heads, epsilon, *arrays), arrays


def _backward(num_heads: int, epsilon: float, saved: tuple, slope: Array):
    words, survival, parameters = saved
    attributes = {"heads": np.int64(num_heads), "epsilon": np.float32(epsilon)}
    like, arguments = (words, *parameters), (words, survival, *parameters, slope)
    of_words, *of_parameters = on_cpu.call("inner_layer_gradient", like, *arguments, **attributes)
    return of_words, jnp.zeros_like(survival), Parameters(*of_parameters)


inner_layer.defvjp(_forward, _backward)
