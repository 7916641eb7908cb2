"""The CUDA formulation of the inner layer, as far as it can be proven without a GPU.

The same source is compiled as C: in float32 throughout it is the equations, in bfloat16 it rounds where a GPU does.
NVRTC compiles it for GPUs, and says how many registers it takes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_in_c import launch
from test_inner import call as call_layer
from test_inner import make_layer, random_words, results

from tnt_jax.models.formulations import inner
from tnt_jax.models.kernels.gpu import call

SIZES = {"TNT-Ti": (12, 2), "TNT-S": (24, 4), "TNT-B": (40, 4)}


@pytest.fixture(autouse=True)
def in_c(monkeypatch):
    monkeypatch.setattr(call, "launch", launch)


def call_cuda(layer, words, *, key):
    return inner.cuda(layer, words, layer.branch_survival(len(words), key), multiprocessors=1)


def compared(sentences, channels, heads, words, dtype, key):
    """What the kernels return and the gradients of all, the same of the equations in float32, and plain JAX's."""
    key = None if key is None else jax.random.key(key)
    x = random_words(sentences, words, channels, dtype)
    layer, exact = (make_layer("reference", channels, heads, dtype=each) for each in (dtype, "float32"))
    kernel = results(layer, x, functools.partial(call_cuda, key=key))
    plain = results(layer, x, functools.partial(call_layer, key=key))
    return kernel, results(exact, x.astype(jnp.float32), functools.partial(call_layer, key=key)), plain


@pytest.mark.parametrize(
    ("sentences", "channels", "heads", "words", "key"),
    [(15, *SIZES["TNT-S"], 16, 7), (1, *SIZES["TNT-Ti"], 16, None), (15, *SIZES["TNT-B"], 9, 7)],
)
def test_in_float32_the_source_is_the_reference(sentences, channels, heads, words, key):
    kernel, expected, _ = compared(sentences, channels, heads, words, "float32", key)
    for one, other in zip(kernel, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)
