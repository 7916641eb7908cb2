"""The inner transformer layer on CPUs, and its gradient: inner_layer.c."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tnt_jax.models.kernels.cpu import library
from tnt_jax.models.kernels.parameters import LayerParameters


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def inner_layer(
    num_heads: int,
    epsilon: float,
    words: Float[Array, "sentences words channels"],
    survival: Float[Array, "2 sentences"],
    parameters: LayerParameters,
) -> Float[Array, "sentences words channels"]:
    """The layer on float32 words; `survival` is what stochastic depth multiplies the two branches of a sentence by.

    A norm whose scale has as many numbers as a word has channels normalises each word, else all words of a sentence.
    For the gradient the layer is computed again, from the words that it was given.
    """
    attributes = {"heads": np.int64(num_heads), "epsilon": np.float32(epsilon)}
    return library.call("inner_layer_forward", words, words, survival, *parameters, **attributes)


def _forward(num_heads: int, epsilon: float, *arrays):
    return inner_layer(num_heads, epsilon, *arrays), arrays


def _backward(num_heads: int, epsilon: float, saved: tuple, cotangent: Array):
    words, survival, parameters = saved
    attributes = {"heads": np.int64(num_heads), "epsilon": np.float32(epsilon)}
    like, arguments = (words, *parameters), (words, survival, *parameters, cotangent)
    of_words, *of_parameters = library.call("inner_layer_gradient", like, *arguments, **attributes)
    return of_words, jnp.zeros_like(survival), LayerParameters(*of_parameters)


inner_layer.defvjp(_forward, _backward)
