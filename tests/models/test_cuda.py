"""The CUDA formulation of the inner layer, as far as it can be proven without a GPU.

The same source is compiled as C: in float32 throughout it is the equations, in bfloat16 it rounds where a GPU does.
NVRTC compiles it for GPUs, and says how many registers it takes.
"""

import functools
import logging
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from cuda_in_c import launch
from test_inner import call as call_layer
from test_inner import make_layer, random_words, results

from tnt_jax.chips import shared_memory
from tnt_jax.models.formulations import inner
from tnt_jax.models.formulations.devices import gpu, say_once
from tnt_jax.models.functions import survivors_of_branches
from tnt_jax.models.kernels.gpu import call, folding, nvrtc
from tnt_jax.models.kernels.gpu.sizes import LayerSizes, Rows
from tnt_jax.models.layers import LayerNorm
from tnt_jax.models.pyramid_tnt import PatchNorm

SIZES = {"TNT-Ti": (12, 2), "TNT-S": (24, 4), "TNT-B": (40, 4)}


@pytest.fixture(autouse=True)
def in_c(monkeypatch):
    monkeypatch.setattr(call, "launch", launch)


def call_cuda(layer, words, *, key):
    return inner.cuda(layer, words, survivors_of_branches(len(words), layer.drop_path_rate, key), multiprocessors=1)


def compared(sentences, channels, heads, words, dtype, key):
    """What the kernels return and the gradients of all, the same of the equations in float32, and plain JAX's."""
    key = None if key is None else jax.random.key(key)
    x = random_words(sentences, words, channels, dtype)
    layer, exact = (make_layer("reference", channels, heads, dtype=each) for each in (dtype, "float32"))
    kernel = results(layer, x, functools.partial(call_cuda, key=key))
    plain = results(layer, x, functools.partial(call_layer, key=key))
    return kernel, results(exact, x.astype(jnp.float32), functools.partial(call_layer, key=key)), plain


def assert_is_the_reference(sentences, channels, heads, words, key):
    kernel, expected, _ = compared(sentences, channels, heads, words, "float32", key)
    for one, other in zip(kernel, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


def test_in_float32_the_source_is_the_reference():
    assert_is_the_reference(15, *SIZES["TNT-S"], 16, key=7)


@pytest.mark.nightly
@pytest.mark.parametrize(("sentences", "key"), [(1, None), (15, 7), (301, None), (301, 7)])
@pytest.mark.parametrize(
    ("channels", "heads", "words"),
    [*((*size, 16) for size in SIZES.values()), (24, 4, 4), (40, 4, 9), (28, 4, 16), (20, 2, 16), (24, 3, 16)],
)
def test_in_float32_every_size_is_the_reference(sentences, channels, heads, words, key):
    assert_is_the_reference(sentences, channels, heads, words, key)


@pytest.mark.parametrize(
    ("sentences", "channels", "heads", "words"),
    [
        (15, *SIZES["TNT-S"], 16),
        *(pytest.param(301, *size, 16, marks=pytest.mark.nightly) for size in SIZES.values()),
        pytest.param(1, *SIZES["TNT-S"], 16, marks=pytest.mark.nightly),
    ],
)
def test_in_bfloat16_it_errs_at_most_twice_as_much_as_plain_jax(sentences, channels, heads, words):
    """Of what is returned and of each gradient, the root of the mean squared error."""
    for one, exact, plain in zip(*compared(sentences, channels, heads, words, "bfloat16", 7), strict=True):
        one, exact, plain = (np.asarray(each, np.float32) for each in (one, exact, plain))
        error, of_plain = (np.sqrt(np.mean((each - exact) ** 2)) for each in (one, plain))
        assert error <= 2 * of_plain


# A layer of sentences that lie on two devices, and its gradients, beside the same on one.
ON_TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from cuda_in_c import launch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from test_inner import make_layer, random_words
from tnt_jax.models.formulations import inner
from tnt_jax.models.kernels.gpu import call
from tnt_jax.training.mesh import make_mesh
call.launch = launch
graphdef, params = nnx.split(make_layer("reference", 12, 2))
words, survival = random_words(6, 16, 12, "float32"), jnp.array([[0, 2, 1, 1, 0, 1], [1, 1, 0, 1, 2, 1.0]])
def run(params, words, survival):
    layer = nnx.merge(graphdef, params)
    return (inner.cuda(layer, words, survival, multiprocessors=1) ** 2).sum()
gradient = jax.value_and_grad(run, argnums=(0, 1))
alone = jax.tree.leaves(gradient(params, words, survival))
mesh = make_mesh(1, jax.devices())
over = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
with jax.set_mesh(mesh):
    placed = over(params), over(words, mesh.axis_names), over(survival, None, mesh.axis_names)
    lowered = jax.jit(gradient).lower(*placed)
    assert "6x16x12" in lowered.as_text() and "3x16x12" in lowered.as_text()
    both = jax.tree.leaves(jax.jit(gradient)(*placed))
for one, other in zip(alone, both, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())
"""


@pytest.mark.nightly
def test_on_a_mesh_each_device_has_its_own_sentences():
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    settings["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/models")))
    command = [sys.executable, "-c", ON_TWO_DEVICES]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# At most so many registers of a thread and bytes that it spills, on any of the architectures: NVRTC 13.5's, and a few.
REGISTERS = {
    ("TNT-Ti", "inner_forward"): (96, 0),
    ("TNT-Ti", "inner_mlp_gradient"): (208, 0),
    ("TNT-Ti", "inner_attention_gradient"): (152, 0),
    ("TNT-S", "inner_forward"): (128, 0),
    ("TNT-S", "inner_mlp_gradient"): (255, 400),
    ("TNT-S", "inner_attention_gradient"): (255, 64),
    ("TNT-B", "inner_forward"): (168, 0),
    ("TNT-B", "inner_mlp_gradient"): (255, 600),
    ("TNT-B", "inner_attention_gradient"): (255, 1100),
    ("TNT-Ti", "norm_gradient"): (80, 0),
    ("TNT-S", "norm_gradient"): (128, 0),
    ("TNT-B", "norm_gradient"): (184, 0),
}
WIDTHS = {"TNT-Ti": 192, "TNT-S": 384, "TNT-B": 640}


def sizes(channels, heads, words=16) -> LayerSizes:
    return LayerSizes(words, channels, heads, 4 * channels, 1e-5)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize(
    ("model", "kernel"),
    [pytest.param(*each, marks=() if each[0] == "TNT-S" else pytest.mark.nightly) for each in REGISTERS],
)
def test_nvrtc_fits_the_kernels_into_registers(model, kernel, architecture):
    width = WIDTHS[model]
    of = Rows(width, width, 1e-5) if kernel == "norm_gradient" else sizes(*SIZES[model])
    options = (*call.options(kernel, of), "--ptxas-options=-v")
    code, log = nvrtc.compile_source(*call.source(kernel), architecture, options)
    assert code.startswith(b"\x7fELF")
    registers, spilled = (int(re.search(rf"(\d+) {what}", log)[1]) for what in ("registers", "bytes spill stores"))
    most_registers, most_spilled = REGISTERS[model, kernel]
    assert registers <= most_registers
    assert spilled <= most_spilled


def test_ptx_is_for_every_card_from_sm_80_on_and_for_old_drivers(tmp_path, monkeypatch):
    """PTX 8.0 is CUDA 12.0's; what is compiled once is read from the cache, unless it is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = (*call.source("inner_forward"), call.options("inner_forward", sizes(12, 2)))
    text = nvrtc.ptx_of(*arguments)
    assert ".version 8.0\n.target sm_80\n" in text
    assert ".visible .entry inner_forward(" in text
    (kept,) = (tmp_path / "tnt_jax").iterdir()
    with monkeypatch.context() as without_compiler:
        without_compiler.setattr(nvrtc, "compile_source", None)
        assert nvrtc.ptx_of(*arguments) == text
    kept.write_text(text[:-100])
    assert nvrtc.ptx_of(*arguments) == text
    assert kept.read_text() == text


def test_what_nvrtc_refuses_is_one_line(tmp_path):
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("__global__ void f() { forty_two(); }")
    with pytest.raises(nvrtc.NvrtcError, match=r"^NVRTC cannot compile wrong.cu for sm_80: .*forty_two.*$") as caught:
        nvrtc.compile_source(wrong, (), "sm_80", ())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kinds", "known"),
    [
        (["A"], (9.0, 99)),
        (["A", "A"], (9.0, 99)),
        (["B", "A"], "the processes have different cards: A, B"),
        ([], "cpu is no GPU that is known"),
    ],
)
def test_what_is_known_of_the_card(on_platform, monkeypatch, kinds, known):
    """`jax.devices()` are those of all processes, so all of them choose alike."""
    cards = [
        types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability="9.0", core_count=99)
        for kind in kinds
    ]
    on_platform(*(("gpu", kinds[0]) if kinds else ("cpu", "cpu")))
    monkeypatch.setattr(jax, "devices", lambda: cards)
    assert gpu() == known


H100 = (9.0, 132)
OTHER_CARDS = "the processes have different cards: A, B"


@pytest.mark.parametrize(
    ("card", "given", "fields", "reason"),
    [
        (H100, {}, {}, None),
        (H100, {"words": 4}, {}, None),
        ((7.5, 40), {}, {}, "needs compute capability 8.0, and this card has 7.5"),
        (OTHER_CARDS, {}, {}, OTHER_CARDS),
        (H100, {}, {"dtype": "float32"}, "computes in bfloat16, and this is float32"),
        (H100, {"words": 25}, {}, "at most 16 words a patch, and these are 25"),
        (H100, {"channels": 48}, {}, "an even number of channels up to 40, and these are 48"),
        (H100, {"channels": 32, "heads": 2}, {}, "heads of at most 15 channels, and these have 16"),
        (H100, {}, {"mlp_ratio": 3.5}, "hidden channels in multiples of 16, and these are 84"),
        (H100, {"channels": 40}, {"mlp_ratio": 16}, "needs 239 KiB of shared memory, and a block of this card has 227"),
        (
            (8.6, 84),
            {"channels": 40},
            {"mlp_ratio": 6},
            "needs 113 KiB of shared memory, and a block of this card has 99",
        ),
        (H100, {"norm": PatchNorm}, {}, "normalises each word by itself"),
        (H100, {}, {"drop_rate": 0.1}, "cuda has no dropout"),
    ],
)
def test_what_it_does_not_cover_is_the_reference_and_is_said_once(
    on_platform, monkeypatch, caplog, card, given, fields, reason
):
    on_platform("gpu")
    monkeypatch.setattr(inner, "gpu", lambda: card)
    say_once.cache_clear()
    given = {"channels": 24, "heads": 4, "norm": LayerNorm} | given
    words = given.pop("words", 16)
    layer = make_layer("cuda", given["channels"], given["heads"], norm=given["norm"], **{"dtype": "bfloat16"} | fields)
    chosen = [inner.choose_inner(layer, 196, words, training=True) for _ in range(2)]
    assert chosen == ["reference" if reason else "cuda"] * 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * bool(reason)
    assert (reason or "") in caplog.text


@pytest.mark.parametrize(("channels", "heads"), SIZES.values(), ids=SIZES)
def test_the_published_sizes_fit_the_smallest_block(channels, heads):
    """Compute capability 8.6 and others have 99 KiB of shared memory for a block."""
    sizes = LayerSizes(16, channels, heads, 4 * channels, 1e-5)
    assert all(0 < wanted <= shared_memory(8.6) for wanted in folding.shared_bytes(sizes).values())


@pytest.mark.parametrize(
    ("platform", "message"),
    [("cpu", "runs on NVIDIA GPUs, and this is a cpu"), ("gpu", "NVRTC is not installed: pip install")],
)
def test_without_a_gpu_or_nvrtc_the_reference_is_run(on_platform, monkeypatch, caplog, platform, message):
    on_platform(platform)
    monkeypatch.setattr(inner, "gpu", lambda: H100)
    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    monkeypatch.setattr(call, "ptx", call.ptx.__wrapped__)
    call.own_means.cache_clear()
    say_once.cache_clear()
    layer = make_layer("cuda", 24, 4, dtype="bfloat16")
    assert inner.choose_inner(layer, 196, 16, training=False) == "reference"
    assert message in caplog.text
    call.own_means.cache_clear()
