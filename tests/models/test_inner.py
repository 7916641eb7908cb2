"""Every formulation of the inner transformer computes the same function with the same gradients."""

import dataclasses
import functools
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tnt_jax.models.formulations import devices, inner, sentences
from tnt_jax.models.formulations.devices import say_once
from tnt_jax.models.functions import gelu, survivors_of_branches
from tnt_jax.models.inner import InnerTransformer
from tnt_jax.models.kernels.cpu import library
from tnt_jax.models.kernels.tpu import inner_block, tile
from tnt_jax.models.layers import LayerNorm
from tnt_jax.models.pyramid_tnt import PatchNorm
from tnt_jax.models.tnt import WordsToSentence
from tnt_jax.models.variants import model_config

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def make_layer(formulation, channels, heads, *, norm=LayerNorm, drop_path_rate=0.3, **fields):
    config = dataclasses.replace(model_config("tnt_s_patch16_224"), inner=formulation, **fields)
    layer = InnerTransformer(channels, heads, drop_path_rate, norm=norm, config=config, rngs=nnx.Rngs(0))
    return randomised(layer)


def make_projection(formulation="reference", *, use_bias=True, in_legacy_block=False, **fields):
    config = dataclasses.replace(model_config("tnt_s_patch16_224"), inner=formulation, **fields)
    layer = WordsToSentence(in_legacy_block=in_legacy_block, use_bias=use_bias, config=config, rngs=nnx.Rngs(0))
    return randomised(layer)


def randomised(layer):
    """The layer with random parameters: fresh ones have zero biases, which hide mistakes."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * random.standard_normal(leaf.shape), leaf.dtype), layer)


def results(layer, words, run):
    """What a layer returns, and the gradients of its words and parameters, for a fixed cotangent."""
    graphdef, params = nnx.split(layer)
    shape = jax.eval_shape(lambda words: run(layer, words), words).shape
    cotangent = np.random.default_rng(2).standard_normal(shape)

    @jax.jit
    def value_and_gradients(params, words):
        def weighted(params, words):
            out = run(nnx.merge(graphdef, params), words).astype(jnp.float32)
            return (out * cotangent).sum(), out

        gradients, out = jax.grad(weighted, argnums=(0, 1), has_aux=True)(params, words)
        return out, gradients

    return jax.tree.leaves(value_and_gradients(params, words))


def assert_equal(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)


def random_words(sentences, words, channels, dtype):
    return jnp.asarray(np.random.default_rng(3).standard_normal((sentences, words, channels)), dtype)


def call(layer, words, *, key):
    return layer(words, key)


def call_kernel(layer, words, *, key):
    count, _, _ = words.shape
    rows, survival = words.reshape(count, -1).T, survivors_of_branches(count, layer.drop_path_rate, key)
    return inner.inner_pallas(layer, rows, survival, interpret=True).T.reshape(words.shape)


@pytest.mark.parametrize("key", [None, 7], ids=["evaluation", "stochastic depth"])
@pytest.mark.parametrize(
    ("channels", "heads", "words", "norm", "dtype"),
    [
        (24, 4, 16, LayerNorm, "float32"),
        pytest.param(24, 4, 16, LayerNorm, "bfloat16", marks=pytest.mark.slow),
        (12, 2, 16, LayerNorm, "float32"),  # TNT-Ti
        (40, 4, 4, LayerNorm, "float32"),  # TNT-B with four words
        (10, 2, 16, PatchNorm, "float32"),
    ],
)
def test_feature_major_is_the_reference(channels, heads, words, norm, dtype, key):
    x = random_words(37, words, channels, dtype)
    run = functools.partial(call, key=None if key is None else jax.random.key(key))
    actual, expected = (
        results(make_layer(formulation, channels, heads, norm=norm, dtype=dtype), x, run)
        for formulation in ("feature_major", "reference")
    )
    assert_equal(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("sentences", "channels", "heads", "words", "norm", "key"),
    [
        (1568, 24, 4, 16, LayerNorm, 7),
        (37, 24, 4, 16, LayerNorm, None),
        (1, 12, 2, 16, LayerNorm, 7),  # TNT-Ti
        (100, 40, 4, 4, LayerNorm, 7),  # TNT-B with four words
        (64, 10, 2, 16, PatchNorm, 7),
        (3, 5, 1, 9, LayerNorm, 7),  # nothing divides into the blocks of its products
    ],
)
def test_native_is_the_reference(sentences, channels, heads, words, norm, key):
    x = random_words(sentences, words, channels, "float32")
    run = functools.partial(call, key=None if key is None else jax.random.key(key))
    actual, expected = (
        results(make_layer(formulation, channels, heads, norm=norm), x, run) for formulation in ("native", "reference")
    )
    assert_equal(actual, expected, TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("sentences", "channels", "heads", "norm"), [(37, 24, 4, LayerNorm), (1, 12, 2, LayerNorm), (64, 10, 2, PatchNorm)]
)
def test_native_in_bfloat16_errs_less_than_plain_jax(sentences, channels, heads, norm):
    """Of what is returned and of each gradient, the root of the mean squared error."""
    x, run = random_words(sentences, 16, channels, "bfloat16"), functools.partial(call, key=jax.random.key(7))
    native, plain, exact = (
        results(make_layer(formulation, channels, heads, norm=norm, dtype=dtype), x.astype(dtype), run)
        for formulation, dtype in (("native", "bfloat16"), ("reference", "bfloat16"), ("reference", "float32"))
    )
    for one, other, right in zip(native, plain, exact, strict=True):
        assert one.dtype == other.dtype
        error, of_plain = (np.sqrt(np.mean((np.float32(each) - np.float32(right)) ** 2)) for each in (one, other))
        assert error <= of_plain


def test_natives_functions_are_within_their_bounds_far_out():
    """GELU of -100 to 100, and softmax of logits that float32's exponential has no value for."""
    layer, reference = (make_layer(formulation, 24, 4) for formulation in ("native", "reference"))
    x = random_words(12, 16, 24, "float32")
    for each in (layer, reference):
        each.mlp.fc1.kernel[...] *= 50
        each.attn.qkv.kernel[...] *= 10
    assert_equal(*(results(each, x, functools.partial(call, key=None)) for each in (layer, reference)), 1e-4)


def test_native_gives_the_same_bits_every_time():
    """Threads take the sentences as they come, and the sums of the gradients do not show it."""
    layer, x = make_layer("native", 24, 4), random_words(700, 16, 24, "float32")
    run = functools.partial(call, key=jax.random.key(7))
    first = results(layer, x, run)
    for _ in range(5):
        for one, other in zip(results(layer, x, run), first, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_so_in_native(dtype):
    layer, x = make_layer("native", 24, 4, dtype=dtype), random_words(20, 16, 24, dtype)
    for value in (np.nan, np.inf):
        out = layer(x.at[7, 3, 2].set(value))
        finite = np.isfinite(np.asarray(out, np.float32)).all((1, 2))
        np.testing.assert_array_equal(finite, np.arange(20) != 7)


def test_native_under_vmap_is_the_reference():
    layer, reference = (make_layer(formulation, 12, 2) for formulation in ("native", "reference"))
    x = random_words(6, 16, 12, "float32").reshape(2, 3, 16, 12)
    assert_equal([jax.vmap(layer)(x)], [reference(x.reshape(6, 16, 12)).reshape(x.shape)], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sentences", "dtype", "key", "cores"),
    [pytest.param(2100, "float32", 7, 2, marks=pytest.mark.nightly), (5, "bfloat16", None, 1)],
)
def test_the_kernel_is_the_reference(monkeypatch, sentences, dtype, key, cores):
    """Few words and channels, because the kernel is slow where it is interpreted; sentences that do not fill a tile,
    and a tile more for one core than for the other."""
    monkeypatch.setitem(devices.CORES, jax.devices()[0].device_kind, cores)
    x = random_words(sentences, 4, 8, dtype)
    layer = make_layer("reference", 8, 2, dtype=dtype, mlp_ratio=2.0)
    key = None if key is None else jax.random.key(key)
    actual = results(layer, x, functools.partial(call_kernel, key=key))
    expected = results(layer, x, functools.partial(call, key=key))
    assert_equal(actual, expected, TOLERANCE[dtype])


@pytest.mark.nightly
def test_registers_of_bfloat16_are_nearly_as_exact_as_plain_bfloat16(monkeypatch):
    """Newer TPUs compute the attention over words and GELU in bfloat16. What comes out and the gradient of the words
    have at most 1.5 times the error of the equations in bfloat16, no gradient of a parameter more than 2.5 times."""
    monkeypatch.setattr(devices, "PACKS", (jax.devices()[0].device_kind,))
    x = random_words(256, 4, 16, "bfloat16")
    layer, exact = (make_layer("reference", 16, 4, dtype=dtype) for dtype in ("bfloat16", "float32"))
    expected = results(exact, x.astype(jnp.float32), functools.partial(call, key=None))

    def errors(run):
        found = results(layer, x, functools.partial(run, key=None))
        pairs = zip(found, expected, strict=True)
        return np.array([np.sqrt(np.mean(np.square(np.asarray(one, np.float64) - other))) for one, other in pairs])

    ratios = errors(call_kernel) / errors(call)
    assert ratios[[0, -1]].max() < 1.5, ratios
    assert ratios.max() < 2.5, ratios


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_is_the_reference_at_the_published_size(dtype):
    layer = make_layer("reference", 24, 4, dtype=dtype)
    x = random_words(1300, 16, 24, dtype)
    assert_equal(
        results(layer, x, functools.partial(call_kernel, key=jax.random.key(7))),
        results(layer, x, functools.partial(call, key=jax.random.key(7))),
        TOLERANCE[dtype],
    )


def test_a_network_of_many_blocks_traces_each_kernel_once(monkeypatch):
    """With and without stochastic depth, which the first block has not. Tracing a kernel takes seconds."""
    traced, over_tiles = [], inner_block.over_tiles

    def counted(name, *arguments, **options):
        traced.append(name)
        return over_tiles(name, *arguments, **options)

    monkeypatch.setattr(inner_block, "over_tiles", counted)
    layers = [make_layer("reference", 8, 2, mlp_ratio=2.0, drop_path_rate=rate) for rate in (0.0, 0.1, 0.2)]

    def through_all(words):
        for layer in layers:
            words = call_kernel(layer, words, key=jax.random.key(7))
        return words.sum()

    jax.make_jaxpr(jax.grad(through_all))(random_words(9, 4, 8, "float32"))
    assert traced == ["inner_block_forward", "inner_block_backward"]


def project(layer, words):
    return with_words(*layer(words, batch=1))


def project_by_kernel(layer, words):
    return with_words(*sentences.sentence_pallas(layer, words, interpret=True))


def with_words(words, sentences):
    """Both results side by side, so that a gradient reaches the words by two ways."""
    return jnp.concatenate([words.reshape(words.shape[0], -1), sentences.reshape(words.shape[0], -1)], axis=1)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_kernels_gelu_is_within_its_bound(scaled):
    x = np.concatenate([np.linspace(-8, 8, 4001), [-1e4, -30, 30, 1e4]]).astype(np.float32)
    if scaled:
        scale = tile.gelu_scale("bfloat16")
        value, slope = tile.scaled_gelu(jnp.asarray(x) * scale, exact=False, derivative=True)
        value, slope = value * (0.5 / scale), slope * 0.5
    else:
        value, slope = tile.gelu_and_derivative(jnp.asarray(x), exact=False)
    exact_value, exact_slope = jax.jvp(gelu, (jnp.asarray(x),), (jnp.ones_like(x),))
    np.testing.assert_allclose(value, exact_value, atol=2.6e-5, rtol=1e-6)
    np.testing.assert_allclose(slope, exact_slope, atol=2e-4)


@pytest.mark.parametrize(
    "compare",
    [
        pytest.param("compare_native_on_a_mesh", marks=pytest.mark.slow),
        pytest.param("compare_pallas_on_a_mesh", marks=pytest.mark.nightly),
    ],
)
def test_every_device_of_a_mesh_runs_the_kernel_on_its_own_sentences(compare):
    """Four devices, whose gradients of the parameters are added up, in a process of their own."""
    flags = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", f"import {__name__}; {__name__}.{compare}()"]
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{pathlib.Path(__file__).parent}:."}
    subprocess.run(command, env=environment, check=True)


def compare_native_on_a_mesh():
    """Four devices know their mesh, or take the reference."""
    layer, reference = (make_layer(formulation, 8, 2) for formulation in ("native", "reference"))
    x, run = random_words(36, 4, 8, "float32"), functools.partial(call, key=jax.random.key(7))
    expected = results(reference, x, run)
    assert jax.device_count() == 4
    assert inner.choose_inner(layer, 36, 16, training=True) == "reference"
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert inner.choose_inner(layer, 36, 16, training=True) == "native"
        assert inner.choose_inner(layer, 37, 16, training=True) == "reference"
        assert_equal(results(layer, x, run), expected, 1e-5)
    projection, x = make_projection(inner_dim=8, outer_dim=24, dtype="bfloat16"), random_words(36, 16, 8, "bfloat16")
    expected = results(projection, x, project)
    with jax.set_mesh(mesh):
        assert_equal(results(projection, x, project), expected, TOLERANCE["bfloat16"])


def compare_pallas_on_a_mesh():
    layer, x = make_layer("reference", 8, 2, mlp_ratio=2.0), random_words(16, 2, 8, "float32")
    run = functools.partial(call_kernel, key=jax.random.key(7))
    expected = results(layer, x, run)
    assert jax.device_count() == 4
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert_equal(results(layer, x, run), expected, 1e-6)
    projection, x = make_projection(inner_dim=8, outer_dim=256), random_words(16, 16, 8, "float32")
    expected = results(projection, x, project_by_kernel)
    with jax.set_mesh(mesh):
        assert_equal(results(projection, x, project_by_kernel), expected, 1e-6)


@pytest.mark.parametrize(
    ("asked", "platform", "channels", "fields", "training", "chosen"),
    [
        ("auto", "cpu", 24, {}, True, "native"),
        ("auto", "cpu", 24, {"dtype": "bfloat16"}, True, "native"),
        ("auto", "cpu", 24, {"drop_rate": 0.1}, True, "reference"),
        ("auto", "cpu", 24, {"drop_rate": 0.1}, False, "native"),
        ("native", "tpu", 24, {}, True, "reference"),
        ("auto", "gpu", 24, {}, True, "reference"),
        ("auto", "tpu", 24, {}, True, "pallas"),
        ("auto", "tpu", 12, {}, True, "feature_major"),  # TNT-Ti: no whole registers
        ("pallas", "cpu", 24, {}, False, "feature_major"),
        ("pallas", "tpu", 24, {"attn_drop_rate": 0.1}, False, "pallas"),
        ("feature_major", "tpu", 24, {"drop_rate": 0.1}, True, "reference"),
        ("reference", "tpu", 24, {}, True, "reference"),
    ],
)
def test_what_is_run_where(on_platform, monkeypatch, caplog, asked, platform, channels, fields, training, chosen):
    on_platform(platform)
    say_once.cache_clear()
    layer = make_layer(asked, channels, 4, **fields)
    with caplog.at_level(logging.WARNING):
        assert [inner.choose_inner(layer, 196, 16, training=training) for _ in range(2)] == [chosen] * 2
    usual = {"cpu": "native", "gpu": "reference", "tpu": "pallas"}[platform]
    fell_back = chosen != (usual if asked == "auto" else asked)
    assert len(caplog.records) == fell_back, "a fallback is logged once, a plain choice never"


@pytest.mark.parametrize(("kind", "chosen"), [("TPU v4", "feature_major"), ("TPU v5 lite", "pallas")])
def test_a_tpu_of_little_vmem_runs_no_kernel(on_platform, monkeypatch, kind, chosen):
    on_platform("tpu")
    monkeypatch.setattr(inner, "device_kind", lambda: kind)
    assert inner.choose_inner(make_layer("auto", 24, 4), 196, 16, training=True) == chosen


def test_without_a_c_compiler_the_reference_is_run(monkeypatch, caplog):
    monkeypatch.setattr(library, "compiled", lambda name: False)
    say_once.cache_clear()
    layer, reference = (make_layer(formulation, 12, 2) for formulation in ("auto", "reference"))
    x = random_words(4, 16, 12, "float32")
    np.testing.assert_array_equal(layer(x), reference(x))
    assert "could not be compiled" in caplog.text


@pytest.mark.parametrize("formulation", ["feature_major", pytest.param("pallas", marks=pytest.mark.slow)])
def test_a_tpu_program_is_made_of_it(formulation):
    """Lowered for a TPU without one: what reaches the compiler is the kernel, or none."""
    layer = make_layer(formulation, 24, 4, dtype="bfloat16")
    run = inner.feature_major if formulation == "feature_major" else inner.inner_pallas
    graphdef, params = nnx.split(layer)

    def gradient(params, words, survival):
        return jax.grad(lambda words: run(nnx.merge(graphdef, params), words, survival).astype(jnp.float32).sum())(
            words
        )

    shapes = (params, jax.ShapeDtypeStruct((384, 196), jnp.bfloat16), jax.ShapeDtypeStruct((2, 196), jnp.float32))
    program = jax.export.export(jax.jit(gradient), platforms=["tpu"])(*shapes).mlir_module()
    assert program.count("@tpu_custom_call") == (2 if formulation == "pallas" else 0)
