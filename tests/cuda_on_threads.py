"""The CUDA kernels' source as a GPU compiles it, on a thread for each CUDA thread, in the place of their launch.

Blocks, their shared memory and their barriers are those of the launch; addresses are sanitised; memory that was not
written is NaN. tests/sanitized/cuda_threads.h says what stands for a GPU's instructions.
"""

import functools
import pathlib
import subprocess
import tempfile

import jax
import numpy as np
from commands import ROOT

from tnt_jax.models.kernels.gpu import call

FLAGS = ("-std=gnu++17", "-O1", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@functools.cache
def program(kernel, sizes, shared) -> pathlib.Path:
    path, headers = call.source(kernel)
    macros = [option.replace("--define-macro=", "-D") for option in call.options(kernel, sizes)]
    folder = pathlib.Path(tempfile.mkdtemp())
    for each in (path, *headers):
        text = each.read_text()
        if each.name == "lanes.h":
            text = (ROOT / "tests/sanitized/cuda_threads.h").read_text()
        (folder / each.name).write_text(text)
    (folder / "program.cpp").write_text(
        f'#define __CUDACC__\n#include "{path.name}"\nalignas(16) pair shared[{shared // 4}];\n'
        f"static void call_kernel(void **given) {{ call({kernel}, given); }}\nMAIN(shared)\n"
    )
    command = ["g++", *FLAGS, *macros, str(folder / "program.cpp"), "-o", str(folder / "program"), "-lpthread"]
    subprocess.run(command, check=True)
    return folder / "program"


def launch(kernel, sizes, arrays, results, *, grid, shared):
    """As `call.launch`."""
    shapes = [jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results]
    threads = 32 * call.warps_and_blocks(kernel, sizes)[0]

    def run(*arrays):
        arrays = [np.ascontiguousarray(array) for array in arrays]
        sizes_of = [array.nbytes for array in arrays] + [
            int(np.prod(each.shape)) * np.dtype(each.dtype).itemsize for each in shapes
        ]
        command = [program(kernel, sizes, shared), grid, threads, len(arrays), *sizes_of]
        given = b"".join(array.tobytes() for array in arrays)
        done = subprocess.run(
            list(map(str, command)), input=given, capture_output=True, env={"ASAN_OPTIONS": "detect_leaks=0"}
        )
        if done.returncode:
            raise AssertionError(done.stderr.decode()[-3000:])
        outs, at = [], 0
        for each, size in zip(shapes, sizes_of[len(arrays) :], strict=True):
            outs.append(np.frombuffer(done.stdout[at : at + size], each.dtype).reshape(each.shape))
            at += size
        return outs

    return jax.pure_callback(run, shapes, *arrays)
