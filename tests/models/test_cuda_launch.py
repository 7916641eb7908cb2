"""The handler that launches the CUDA kernels (launch.c), in programs that XLA runs on this CPU.

A libcuda of the tests' own stands in for NVIDIA's (fake_cuda.c): what is launched runs as C, so its numbers come out.
"""

import ctypes
import os
import re
import shlex
import subprocess
import sys
import threading

import cuda_in_c
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from test_inner import make_layer, random_words, results

from tnt_jax import c_compiler
from tnt_jax.models.formulations import inner
from tnt_jax.models.functions import survivors_of_branches
from tnt_jax.models.kernels.gpu import call, folding
from tnt_jax.models.kernels.gpu.sizes import KERNELS

STREAM = 0x7000  # of context 0x7000; each test has a context of its own
PARAMETERS = {"inner_forward": 6, "inner_mlp_gradient": 7, "inner_attention_gradient": 7}


class Seen(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char * 64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p * 16),
        ("context", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("count", "loads", "launches", "contexts_left", "shared_allowed")),
    ]


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    """The stand-in, under the name by which the handler asks for NVIDIA's, and the handler on CPUs with a stream."""
    made = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    flags = ["-std=gnu11", "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", f"-I{jax.ffi.include_dir()}"]
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, *flags, str(ROOT / "tests/fake_cuda.c"), "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))
    library.hand_on_to(
        ctypes.cast(call.handler_library().launch_cuda, ctypes.c_void_p), None, 0
    )  # asked for its version
    jax.ffi.register_ffi_target(call.HANDLER, jax.ffi.pycapsule(library.with_stream), platform="cpu")
    return library


@pytest.fixture
def seen(libcuda):
    """What was launched last, in a new context."""
    global STREAM
    STREAM += 0x100
    libcuda.hand_on_to(ctypes.cast(call.handler_library().launch_cuda, ctypes.c_void_p), ctypes.c_void_p(STREAM), 0)
    found = Seen.in_dll(libcuda, "seen")
    found.loads = found.launches = 0
    yield found
    libcuda.fail(b"", 0)


def layer_and_words(libcuda, channels=24):
    """A layer, whose kernels are those that are launched from then on, and words for it."""
    layer = make_layer("cuda", channels, 4, dtype="bfloat16")
    for kernel in KERNELS:
        function = getattr(cuda_in_c.library(kernel, inner.cuda_sizes(layer, 16), exact=False), kernel)
        libcuda.run_for(kernel.encode(), ctypes.cast(function, ctypes.c_void_p), PARAMETERS[kernel])
    return layer, random_words(7, 16, channels, "bfloat16")


def call_cuda(layer, words):
    return inner.cuda(layer, words, survivors_of_branches(len(words), layer.drop_path_rate, None), multiprocessors=1)


def test_what_xla_launches_is_the_kernel_with_its_buffers(seen, libcuda):
    """Forward and both kernels of the gradient; the numbers are those of the C build called without XLA's handler."""
    layer, words = layer_and_words(libcuda)
    found = jax.block_until_ready(results(layer, words, call_cuda))
    assert (seen.loads, seen.launches) == (3, 3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(call, "launch", cuda_in_c.launch)
        expected = results(layer, words, call_cuda)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert seen.kernel == b"inner_attention_gradient"
    assert (list(seen.grid), list(seen.block)) == ([1, 1, 1], [256, 1, 1])
    assert (seen.stream, seen.context, seen.contexts_left) == (STREAM, STREAM, 0)
    assert seen.shared == 512 * folding.attention_sums(inner.cuda_sizes(layer, 16))
    assert seen.count == 7
    assert len({*seen.parameters[:7]}) == 7


def test_a_module_is_loaded_once_for_each_context(seen, libcuda):
    layer, words = layer_and_words(libcuda)
    run = jax.jit(call_cuda)
    run(layer, words).block_until_ready()
    run(layer, random_words(9, 16, 24, "bfloat16")).block_until_ready()
    assert (seen.loads, seen.launches) == (1, 2)
    handler = ctypes.cast(call.handler_library().launch_cuda, ctypes.c_void_p)
    libcuda.hand_on_to(handler, ctypes.c_void_p(STREAM + 1), 0)
    run(layer, words).block_until_ready()
    assert (seen.loads, seen.stream, seen.context) == (1, STREAM + 1, STREAM), "another stream of the same context"
    libcuda.hand_on_to(handler, ctypes.c_void_p(STREAM + 0x80000), 0)
    run(layer, words).block_until_ready()
    assert (seen.loads, seen.context) == (2, STREAM + 0x80000)


def test_the_stage_before_execution_loads_and_does_not_launch(seen, libcuda):
    handler = ctypes.cast(call.handler_library().launch_cuda, ctypes.c_void_p)
    libcuda.hand_on_to(handler, ctypes.c_void_p(STREAM), 1)
    layer, words = layer_and_words(libcuda)
    jax.jit(call_cuda)(layer, words).block_until_ready()
    assert (seen.loads, seen.launches) == (1, 1)


def test_threads_load_a_module_once(seen, libcuda):
    layer, words = layer_and_words(libcuda)
    run, expected, found = jax.jit(call_cuda), None, []
    compiled = run.lower(layer, words).compile()
    gate = threading.Barrier(4)

    def work():
        gate.wait()
        for _ in range(5):
            found.append(np.asarray(compiled(layer, words), np.float32))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), seen.loads, seen.launches) == (20, 1, 20)
    expected = found[0]
    assert all(np.array_equal(each, expected) for each in found)


@pytest.mark.parametrize(
    ("function", "more"),
    [
        ("cuStreamGetCtx", ""),
        ("cuCtxPushCurrent", ""),
        ("cuModuleLoadDataEx", ": ptxas: line 7"),
        ("cuModuleGetFunction", ""),
        ("cuFuncSetAttribute", ""),
        ("cuLaunchKernel", ""),
    ],
)
def test_what_the_driver_refuses_is_xlas_error_with_its_words(seen, libcuda, function, more):
    layer, words = layer_and_words(libcuda, channels=40)  # a TNT-B's: it asks for more shared memory
    run = jax.jit(call_cuda)
    libcuda.fail(function.encode(), 700)
    said = f"CUDA kernel inner_forward: {function} failed: the driver's words (CUDA_ERROR_OF_A_TEST, 700){more}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(said)):
        run(layer, words).block_until_ready()
    libcuda.fail(b"", 0)
    assert np.isfinite(np.asarray(run(layer, words), np.float32)).all(), "it goes on"
    assert 48 * 1024 < seen.shared == seen.shared_allowed
    assert seen.contexts_left == 0


def test_a_call_with_other_attributes_is_refused(seen):
    other = jax.ffi.ffi_call(call.HANDLER, jax.ShapeDtypeStruct((1,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="launch_cuda: a call with other attributes"):
        other(jnp.zeros(1), kernel="inner_forward", grid=np.int64(1)).block_until_ready()


# A call of the handler where there is no driver.
WITHOUT_DRIVER = """
import ctypes, sys
import jax, jax.numpy as jnp, numpy as np
from tnt_jax.models.kernels.gpu import call
ctypes.CDLL(sys.argv[1])
stand_in = ctypes.CDLL(sys.argv[2])
stand_in.hand_on_to(ctypes.cast(call.handler_library().launch_cuda, ctypes.c_void_p), None, 0)
jax.ffi.register_ffi_target(call.HANDLER, jax.ffi.pycapsule(stand_in.with_stream), platform="cpu")
shape = jax.ShapeDtypeStruct((1,), jnp.float32)
call.by_handler("inner_forward", ".entry", [shape], 1, 32, 0)(jnp.zeros(1))[0].block_until_ready()
"""


@pytest.mark.nightly
def test_without_the_driver_the_error_says_so(tmp_path):
    made = tmp_path / "stream.so"
    flags = ["-std=gnu11", "-fPIC", "-shared", f"-I{jax.ffi.include_dir()}"]
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, *flags, str(ROOT / "tests/fake_cuda.c"), "-o", str(made)], check=True)
    command = [sys.executable, "-c", WITHOUT_DRIVER.replace("ctypes.CDLL(sys.argv[1])\n", ""), "", str(made)]
    settings = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert "NVIDIA's driver libcuda.so.1 cannot be used: libcuda.so.1: cannot open shared object file" in done.stderr


def test_without_a_compiler_xlas_own_call_launches_the_kernel(monkeypatch):
    """The program for a GPU, with either way of launching in it."""
    layer = make_layer("cuda", 24, 4, dtype="bfloat16")
    shapes = jax.ShapeDtypeStruct((100, 16, 24), jnp.bfloat16), jax.ShapeDtypeStruct((2, 100), jnp.float32)

    def program():
        run = jax.jit(lambda words, survival: inner.cuda(layer, words, survival, multiprocessors=132))
        allowed = map(jax.export.DisabledSafetyCheck.custom_call, ("__gpu$xla.gpu.ptx", call.HANDLER))
        return jax.export.export(run, platforms=["cuda"], disabled_checks=list(allowed))(*shapes).mlir_module()

    by_handler = program()
    assert by_handler.count(f"@{call.HANDLER}") == 1
    assert "__gpu$xla.gpu.ptx" not in by_handler
    for number in ("grid = 13 : i32", "block = 256 : i32", f"shared = {36 * 512 + 24 * 4} : i32"):
        assert number in by_handler
    monkeypatch.setattr(c_compiler, "library", lambda *_, **__: None)
    call.handler_library.cache_clear()
    call.own_means.cache_clear()
    assert call.own_means(inner.cuda_sizes(layer, 16)) == call.Means(None, handler=False)
    by_ptx_call = program()
    call.handler_library.cache_clear()
    call.own_means.cache_clear()
    assert by_ptx_call.count("@__gpu$xla.gpu.ptx") == 1
    assert call.HANDLER not in by_ptx_call
    for number in ("grid_x = 13 : i32", "block_x = 256 : i32", f"shared_mem_bytes = {36 * 512 + 24 * 4} : i32"):
        assert number in by_ptx_call
    assert all(".entry inner_forward(" in text for text in (by_handler, by_ptx_call))


def test_the_key_is_that_of_the_image():
    """Modules are told apart by it."""
    shapes = [jax.ShapeDtypeStruct((1,), jnp.float32)]
    keys = [call.by_handler("kernel", text, shapes, 1, 32, 0).keywords["key"] for text in ("a", "a", "b")]
    assert keys[0] == keys[1] != keys[2]
