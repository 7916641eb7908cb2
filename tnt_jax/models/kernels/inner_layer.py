"""The inner transformer layer as one function in C for CPUs, inner_layer.c, and its gradient as another."""

import functools
import pathlib
import platform
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tnt_jax import native

SOURCE = pathlib.Path(__file__).with_suffix(".c")
FORWARD, GRADIENT = "tnt_jax_inner_forward", "tnt_jax_inner_gradient"


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


@functools.cache
def available() -> bool:
    """Whether this machine has compiled it; XLA knows it from then on."""
    include = pathlib.Path(jax.ffi.include_dir())
    headers = (SOURCE.with_name("lanes.h"), SOURCE.with_name("threads.h"), include / "xla/ffi/api/c_api.h")
    processor = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    # Roots that set no errno are vector instructions.
    flags = ("-std=gnu11", "-O3", processor, "-fno-math-errno", f"-I{include}")
    library = native.library(SOURCE, flags, headers, without="inner transformers are computed three times slower")
    if library is None:
        return False
    for name in (FORWARD, GRADIENT):
        function = getattr(library, name.removeprefix("tnt_jax_"))
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return True


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
    call = jax.ffi.ffi_call(FORWARD, jax.ShapeDtypeStruct(words.shape, words.dtype), vmap_method="sequential")
    return call(words, survival, *parameters, heads=np.int64(num_heads), epsilon=np.float32(epsilon))


def _forward(num_heads, epsilon, words, survival, parameters):
    return inner_layer(num_heads, epsilon, words, survival, parameters), (words, survival, parameters)


def _backward(num_heads, epsilon, saved, slope):
    words, survival, parameters = saved
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (words, *parameters)]
    call = jax.ffi.ffi_call(GRADIENT, shapes, vmap_method="sequential")
    of_words, *of_parameters = call(
        words, survival, *parameters, slope, heads=np.int64(num_heads), epsilon=np.float32(epsilon)
    )
    return of_words, jnp.zeros_like(survival), Parameters(*of_parameters)


inner_layer.defvjp(_forward, _backward)
