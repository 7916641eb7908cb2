"""The CUDA kernels' source compiled as C for this machine (kernels/gpu/lanes.h), in the place of their launch."""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile

import jax
import numpy as np

from tnt_jax.models.kernels.gpu import call


@functools.cache
def library(kernel, sizes, exact) -> ctypes.CDLL:
    path, _ = call.source(kernel)
    macros = [option.replace("--define-macro=", "-D") for option in call.options(kernel, sizes)]
    flags = ["-x", "c", "-std=gnu11", "-O1", "-Wno-psabi", "-fPIC", "-shared", *macros, *["-DEXACT"] * exact]
    with tempfile.TemporaryDirectory() as folder:
        command = [*shlex.split(os.environ.get("CC", "cc")), *flags, str(path), "-o", f"{folder}/made.so", "-lm"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(f"{folder}/made.so")


def launch(kernel, sizes, arrays, results, *, grid, shared):
    """As `call.launch`; words in float32 are computed in float32 throughout. One block does it all."""
    shapes = [jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results]

    def run(*arrays):
        arrays = [np.ascontiguousarray(array) for array in arrays]
        outs = [np.zeros(shape.shape, shape.dtype) for shape in shapes]
        function = getattr(library(kernel, sizes, arrays[0].dtype == np.float32), kernel)
        function(*(each.ctypes.data_as(ctypes.c_void_p) for each in (*arrays, *outs)))
        return outs

    return jax.pure_callback(run, shapes, *arrays)
