"""How words become sentences: the TPU kernel is the equations, and which projections it runs."""

import logging

import jax
import pytest
from test_inner import TOLERANCE, assert_equal, make_projection, project, project_by_kernel, random_words, results

from tnt_jax.models.formulations import devices, sentences
from tnt_jax.models.formulations.devices import say_once


@pytest.mark.parametrize(
    ("sentences", "dtype", "use_bias"),
    [(1100, "float32", False), (2, "float32", True), pytest.param(1100, "bfloat16", True, marks=pytest.mark.slow)],
)
def test_the_projections_kernel_is_the_reference(monkeypatch, sentences, dtype, use_bias):
    monkeypatch.setitem(devices.CORES, jax.devices()[0].device_kind, 2)
    layer = make_projection(use_bias=use_bias, outer_dim=256, dtype=dtype)
    x = random_words(sentences, 16, 24, dtype)
    assert_equal(results(layer, x, project_by_kernel), results(layer, x, project), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("asked", "platform", "fields", "kernel"),
    [
        ("auto", "tpu", {}, True),
        ("auto", "cpu", {}, False),
        ("feature_major", "tpu", {}, False),
        ("pallas", "tpu", {"in_legacy_block": True}, False),
        ("pallas", "tpu", {"inner_dim": 12, "outer_dim": 192}, False),  # TNT-Ti: no whole registers
    ],
)
def test_which_projections_are_kernels(on_platform, monkeypatch, caplog, asked, platform, fields, kernel):
    on_platform(platform)
    say_once.cache_clear()
    layer = make_projection(asked, **fields)
    with caplog.at_level(logging.WARNING):
        assert [sentences.sentence_kernel(layer, 196) is not None for _ in range(2)] == [kernel] * 2
    assert len(caplog.records) == bool(fields), "a fallback is logged once, a plain choice never"
