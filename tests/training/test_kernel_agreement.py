"""Processes that have different compilers compute their inner layers alike."""

import os
import subprocess
import sys

import pytest
from commands import ROOT
from small_runs import free_port

# One of two processes, without what it is told to lack; it says what it goes by and what it chooses on an H100.
PROCESS = """
import logging, os, sys
import jax
address, index, lacks, cache = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ["XDG_CACHE_HOME"] = cache
if lacks == "compiler":
    os.environ["CC"] = "/nowhere/cc"
jax.distributed.initialize(address, 2, index)
from tnt_jax.models.formulations import inner
from tnt_jax.models.kernels.gpu import call, nvrtc
from tnt_jax.models.variants import abstract_model, model_config
from tnt_jax.training.agreement import agree_on_kernels
from tnt_jax.training.mesh import make_mesh
if lacks == "nvrtc":
    nvrtc._library = lambda: None
inner.gpu, inner.platform = lambda: (9.0, 132), lambda: "gpu"
logging.basicConfig(level=logging.WARNING, format="note: %(message)s", force=True)
config = model_config("tnt_s_patch16_224", inner="cuda", dtype="bfloat16")
layer = abstract_model(config).blocks[0].inner
with jax.set_mesh(make_mesh(1, jax.devices())):
    if lacks == "agreement":
        print(inner.cuda_obstacle(layer, 392, 16))
    else:
        agree_on_kernels(config)
        print(call.means(inner.cuda_sizes(layer, 16)))
        print(inner.choose_inner(layer, 392, 16, training=True))
"""


def outcomes(tmp_path, first, second):
    """What both say, and the notes of both."""
    address = f"127.0.0.1:{free_port()}"
    settings = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), lacks, str(tmp_path / str(index))],
            env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index, lacks in enumerate((first, second))
    ]  # fmt: skip
    texts = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    notes = [[line for line in text[1].splitlines() if line.startswith("note: ")] for text in texts]
    said = [[line for line in text[0].splitlines() if not line.startswith("[Gloo]")] for text in texts]
    return said, notes


@pytest.mark.nightly
def test_what_one_lacks_none_uses(tmp_path):
    """NVRTC: the equations, said once. A C compiler: the kernel, launched by XLA's own call. Neither said: nothing."""
    said, notes = outcomes(tmp_path / "nvrtc", "nothing", "nvrtc")
    assert said[0] == said[1]
    assert "process 1 on " in said[0][0]
    assert "NVRTC is not installed" in said[0][0]
    assert said[0][1] == "reference"
    assert [len(each) for each in notes] == [1, 0]
    assert "inner transformers are computed as reference" in notes[0][0]

    said, _ = outcomes(tmp_path / "compiler", "compiler", "nothing")
    assert said == [["Means(obstacle=None, handler=False)", "cuda"]] * 2

    said, _ = outcomes(tmp_path / "all", "nothing", "nothing")
    assert said == [["Means(obstacle=None, handler=True)", "cuda"]] * 2

    said, _ = outcomes(tmp_path / "none", "agreement", "agreement")
    assert said[0] == said[1]
    assert "several processes have not agreed on how the CUDA kernel is compiled" in said[0][0]
