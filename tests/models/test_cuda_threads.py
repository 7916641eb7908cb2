"""The half of the CUDA sources that only a GPU runs: blocks, shared memory, what warps exchange, sums over a grid."""

import functools

import cuda_on_threads
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_inner import call as call_layer
from test_inner import make_layer, random_words, results

from tnt_jax.models.formulations import folded, inner
from tnt_jax.models.functions import survivors_of_branches
from tnt_jax.models.kernels.gpu import call


@pytest.fixture(autouse=True)
def on_threads(monkeypatch):
    monkeypatch.setattr(call, "launch", cuda_on_threads.launch)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("channels", "heads", "words", "sentences", "multiprocessors"),
    [(24, 4, 16, 21, 1), (12, 2, 16, 9, 2), (40, 4, 16, 5, 1)],
)
def test_an_inner_layer_and_its_gradients_err_at_most_twice_as_much_as_plain_jax(
    channels, heads, words, sentences, multiprocessors
):
    key, x = jax.random.key(7), random_words(sentences, words, channels, "bfloat16")
    layer, exact = (make_layer("reference", channels, heads, dtype=each) for each in ("bfloat16", "float32"))

    def cuda(layer, words, *, key):
        survival = survivors_of_branches(len(words), layer.drop_path_rate, key)
        return inner.cuda(layer, words, survival, multiprocessors=multiprocessors)

    kernel = results(layer, x, functools.partial(cuda, key=key))
    plain = results(layer, x, functools.partial(call_layer, key=key))
    expected = results(exact, x.astype(jnp.float32), functools.partial(call_layer, key=key))
    for one, other, true in zip(kernel, plain, expected, strict=True):
        one, other, true = (np.asarray(each, np.float32) for each in (one, other, true))
        assert np.isfinite(one).all()
        error, of_plain = (np.sqrt(np.mean((each - true) ** 2)) for each in (one, other))
        assert error <= 2 * of_plain


@pytest.mark.nightly
@pytest.mark.parametrize(("rows", "inputs", "width"), [(37, 192, 192), (19, 384, 384)])
def test_a_folded_norm_and_its_gradients_are_the_equations(rows, inputs, width):
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x, cotangent = drawn(rows, inputs).astype(jnp.bfloat16) + 1, drawn(rows, width).astype(jnp.bfloat16)
    first, last = (folded.NormParameters(1 + drawn(size) / 5, drawn(size)) for size in (inputs, width))
    matrix, offset = drawn(inputs, width) / 20, drawn(width)

    def run(multiprocessors):
        def norm(*of):
            return folded.norm_linear_norm(1e-5, multiprocessors, *of)

        out, backward = jax.vjp(norm, x, first, matrix, offset, last)
        return jax.tree.leaves((out, backward(cotangent)))

    for one, other in zip(run(1), run(None), strict=True):
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        assert np.abs(one - other).max() <= 0.02 * np.abs(other).max()
