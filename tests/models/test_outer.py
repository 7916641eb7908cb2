"""The outer transformer layer as one TPU kernel computes what the equations do, with the same gradients."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_inner import results

from tnt_jax.models.formulations import devices, outer
from tnt_jax.models.layers import ABSTRACT, TransformerLayer
from tnt_jax.models.tnt import Block
from tnt_jax.models.variants import model_config

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def make_layer(dim, heads, **fields):
    config = dataclasses.replace(model_config("tnt_s_patch16_224"), inner="reference", **fields)
    layer = TransformerLayer(dim, heads, 0.3, config=config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    # Fresh parameters have zero biases and near equal attention weights, which hide mistakes.
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype), layer)


def random_tokens(batch, tokens, dim, dtype):
    return jnp.asarray(np.random.default_rng(3).standard_normal((batch, tokens, dim)), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, 7], ids=["evaluation", "stochastic depth"])
@pytest.mark.parametrize(
    ("batch", "tokens", "patches", "heads", "dtype"),
    [
        pytest.param(3, 10, 0, 2, "float32", marks=pytest.mark.nightly),
        (5, 18, 16, 2, "float32"),  # two tokens before them
        (1, 16, 15, 2, "float32"),  # XLA adds
        pytest.param(2, 197, 196, 4, "float32", marks=pytest.mark.nightly),
        (9, 37, 36, 2, "bfloat16"),
    ],
)
def test_pallas_is_the_reference(monkeypatch, batch, tokens, patches, heads, dtype, key):
    monkeypatch.setitem(devices.CORES, jax.devices()[0].device_kind, 2 if batch > 3 else 1)
    dim = 64 * heads
    x = random_tokens(batch, tokens + patches, dim, dtype)
    key = None if key is None else jax.random.key(key)

    def run(layer, x, *, kernel):
        x, added = x[:, :tokens], x[:, tokens:] if patches else None
        if kernel:
            return outer.outer_pallas(layer, x, key, added, interpret=True)
        return layer(x, key, added=added)

    expected = results(make_layer(dim, heads), x.astype(jnp.float32), functools.partial(run, kernel=False))
    actual = results(make_layer(dim, heads, dtype=dtype), x, functools.partial(run, kernel=True))
    for one, other in zip(actual, expected, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, atol=TOLERANCE[dtype] * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize(
    ("asked", "platform", "changes", "kernel"),
    [
        ("auto", "tpu", {}, True),
        ("pallas", "tpu", {"tokens": 577}, True),  # 384 x 384 pixels
        ("auto", "tpu", {"dim": 640, "heads": 10}, True),  # TNT-B
        ("auto", "tpu", {"dim": 192, "heads": 3}, False),  # TNT-Ti: no pairs of heads
        ("auto", "tpu", {"dim": 384, "heads": 12}, False),
        ("auto", "tpu", {"dim": 640, "heads": 10, "tokens": 577}, False),  # no room in VMEM
        ("auto", "tpu", {"dtype": "float32"}, False),
        ("auto", "tpu", {"drop_rate": 0.1}, False),
        ("auto", "tpu", {"squeeze_excitation": True}, False),
        ("auto", "tpu", {"has_bias": True}, False),
        ("feature_major", "tpu", {}, False),
        ("reference", "tpu", {}, False),
        ("auto", "gpu", {}, False),
        ("pallas", "cpu", {}, False),
    ],
)
def test_what_is_run_where(on_platform, monkeypatch, asked, platform, changes, kernel):
    on_platform(platform)
    usual = {"dim": 384, "heads": 6, "tokens": 197, "has_bias": False, "squeeze_excitation": False, "dtype": "bfloat16"}
    given = usual | changes
    dim, heads, tokens, has_bias, squeeze_excitation = (given.pop(name) for name in list(usual)[:5])
    config = dataclasses.replace(model_config("tnt_s_patch16_224"), inner=asked, **given)
    layer = TransformerLayer(dim, heads, 0.1, squeeze_excitation=squeeze_excitation, config=config, rngs=ABSTRACT)
    found = outer.outer_kernel(layer, (4, tokens, dim), has_bias=has_bias, training=True)
    assert (found is not None) == kernel


@pytest.mark.slow
def test_a_tpu_program_is_made_of_it(on_platform, monkeypatch):
    """Lowered for a TPU without one, a block of TNT-S has two kernels for its tokens: forward and backward."""
    on_platform("tpu")
    config = model_config("tnt_s_patch16_224", dtype="bfloat16")
    graphdef, params = nnx.split(Block(0.1, has_inner=True, config=config, rngs=ABSTRACT))

    def gradient(params, words, sentences):
        return jax.value_and_grad(
            lambda params: nnx.merge(graphdef, params)(words, sentences)[1].astype(jnp.float32).sum()
        )(params)

    words = jax.ShapeDtypeStruct((4 * 196, 16, 24), jnp.bfloat16)
    sentences = jax.ShapeDtypeStruct((4, 197, 384), jnp.bfloat16)
    program = jax.export.export(jax.jit(gradient), platforms=["tpu"])(params, words, sentences).mlir_module()
    assert [program.count(f"outer_layer_{way}") > 0 for way in ("forward", "backward")] == [True, True]


@pytest.mark.nightly
def test_every_device_of_a_mesh_runs_the_kernel_on_its_own_images():
    """Four devices, whose gradients of the parameters are added up, in a process of their own."""
    command = [sys.executable, "-c", f"import {__name__}; {__name__}.compare_on_a_mesh()"]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": f"{pathlib.Path(__file__).parent}:.",
    }
    subprocess.run(command, env=environment, check=True)


def compare_on_a_mesh():
    layer, x = make_layer(128, 2, mlp_ratio=1.0), random_tokens(8, 33, 128, "float32")

    def run(layer, x):
        return outer.outer_pallas(layer, x[:, :17], jax.random.key(7), x[:, 17:], interpret=True)

    expected = results(layer, x, run)
    assert jax.device_count() == 4
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        actual = results(layer, x, run)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max(), rtol=0)
