"""The C sources under AddressSanitizer and UndefinedBehaviorSanitizer, with thousands of random shapes."""

import os
import platform
import shutil
import subprocess

import jax
import pytest
from commands import ROOT

SANITIZED = ROOT / "tests/sanitized"
FLAGS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# Under x86, also what a processor without vector instructions would run.
X86 = [
    "-march=native",
    pytest.param("-mno-avx", marks=pytest.mark.nightly),
    pytest.param("-mno-sse3", marks=pytest.mark.nightly),
]
SETS = X86 if platform.machine() == "x86_64" else ["-O1"]
IS = {"inner_layer": ["-DINNER"], "transpose": ["-DTRANSPOSE"]}


def run(tmp_path, harness, turns, flags, seed):
    if not shutil.which("cc"):
        pytest.fail("a C compiler is needed")
    program = tmp_path / "program"
    made = subprocess.run(
        ["cc", *FLAGS, *flags, str(SANITIZED / harness), "-o", str(program), "-lm", "-lpthread"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    # What a thread keeps for its next call is not given back at its end.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(program), str(turns), str(seed)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("instructions", SETS)
def test_resampling_is_clean(instructions, tmp_path):
    flags = ["-ffp-contract=off", instructions, f"-I{ROOT}/tnt_jax/data"]
    assert run(tmp_path, "resampling.c", 2000, flags, seed=1) == "4000 images\n"


@pytest.mark.slow
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kernel", ["inner_layer", "attention", "transpose"])
def test_kernels_are_clean(kernel, instructions, tmp_path):
    flags = ["-std=gnu11", "-fno-math-errno", instructions, f"-I{ROOT}/tnt_jax/models/kernels/cpu"]
    flags += [f"-I{jax.ffi.include_dir()}", f'-DKERNEL="{kernel}.c"', *IS.get(kernel, [])]
    assert run(tmp_path, "kernels.c", 1000, flags, seed=2) == "2000 calls\n"
