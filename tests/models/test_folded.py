"""Words to sentence with the first norm folded into the linear map is the reference, with the same gradients."""

import cuda_in_c
import jax.numpy as jnp
import numpy as np
import pytest
from test_inner import make_projection, project, random_words, results, with_words

from tnt_jax.models.formulations import inner, sentences
from tnt_jax.models.kernels.gpu import call


def by_folding(layer, words):
    return with_words(words, sentences.folded(layer, words, None))


def by_kernel(layer, words):
    return with_words(words, sentences.folded(layer, words, 1))


@pytest.fixture(autouse=True)
def in_c(monkeypatch):
    monkeypatch.setattr(call, "launch", cuda_in_c.launch)


@pytest.mark.parametrize("run", [by_folding, by_kernel])
@pytest.mark.parametrize(("count", "use_bias", "mean"), [(1, False, 0), (37, True, 0), (37, False, 30)])
def test_in_float32_it_is_the_reference(run, count, use_bias, mean):
    """Also of words far from zero, whose mean the product takes away."""
    layer = make_projection(use_bias=use_bias, outer_dim=64)
    words = random_words(count, 16, 24, "float32") + mean
    pairs = zip(results(layer, words, run), results(layer, words, project), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, mean) * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize("run", [by_folding, by_kernel])
@pytest.mark.parametrize(("use_bias", "mean"), [(True, 0), (False, 0), (False, 3)])
def test_in_bfloat16_it_errs_at_most_twice_as_much_as_plain_jax(run, use_bias, mean):
    """Of what is returned and of each gradient, the root of the mean squared error."""
    words = random_words(301, 16, 24, "bfloat16") + jnp.bfloat16(mean)
    layer, plain, exact = (
        make_projection("auto" if dtype == "bfloat16" else "reference", use_bias=use_bias, dtype=dtype)
        for dtype in ("bfloat16", "bfloat16", "float32")
    )
    of_all = (
        results(layer, words, run),
        results(exact, words.astype(jnp.float32), project),
        results(plain, words, project),
    )
    for one, exact, plain in zip(*of_all, strict=True):
        one, exact, plain = (np.asarray(each, np.float32) for each in (one, exact, plain))
        error, of_plain = (np.sqrt(np.mean((each - exact) ** 2)) for each in (one, plain))
        assert error <= 2 * of_plain


H100 = (9.0, 132)


@pytest.mark.parametrize(
    ("asked", "platform", "card", "fields", "chosen"),
    [
        ("cuda", "gpu", H100, {}, "folded"),
        ("cuda", "gpu", (7.5, 40), {}, "reference"),
        ("cuda", "gpu", H100, {"dtype": "float32"}, "reference"),
        ("cuda", "gpu", H100, {"outer_dim": 100}, "reference"),
        ("cuda", "gpu", H100, {"in_legacy_block": True}, "reference"),
        ("cuda", "cpu", H100, {}, "reference"),
        ("auto", "gpu", H100, {}, "reference"),
        ("reference", "gpu", H100, {}, "reference"),
    ],
)
def test_what_is_run_where(on_platform, monkeypatch, asked, platform, card, fields, chosen):
    on_platform(platform)
    for module in (inner, sentences):
        monkeypatch.setattr(module, "gpu", lambda: card)
    ran, run = [], sentences.folded
    monkeypatch.setattr(sentences, "folded", lambda *given: ran.append("folded") or run(*given))
    layer = make_projection(asked, **{"dtype": "bfloat16"} | fields)
    layer(random_words(2, 16, 24, "float32"), batch=1)
    assert (ran or ["reference"]) == [chosen]
