"""The one place that calls a CUDA kernel from a program of JAX.

The kernel's PTX stands in the program either way:

- As an attribute of a typed FFI handler, which is XLA's documented way for functions in C: launch.c loads the PTX by
  NVIDIA's driver and launches it on XLA's stream. Where the machine's C compiler makes it, this is what is taken.
- Else as an argument of `__gpu$xla.gpu.ptx`, a custom call of XLA's own: its ptxas assembles the kernel with the
  program, and no code of ours runs on the host. XLA has tests of that call and no documentation, so it may change.
"""

import ctypes
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from tnt_jax import c_compiler
from tnt_jax.models.kernels.gpu import nvrtc
from tnt_jax.models.kernels.gpu.sizes import LayerSizes, Rows

FOLDER = pathlib.Path(__file__).parent
HANDLER = "tnt_jax_launch_cuda"
NOT_AGREED = "several processes have not agreed on how the CUDA kernel is compiled, as train.py's do"


def warps_and_blocks(kernel: str, sizes: LayerSizes | Rows) -> tuple[int, int]:
    """Warps of a block, and blocks that a multiprocessor is to hold: the registers of a thread follow from them."""
    if kernel == "norm_gradient":
        return (8, 2) if sizes.width <= 384 else (8, 1)
    if kernel != "inner_forward":
        return 8, 1
    return (8, 2) if sizes.channels <= 32 else (12, 1)


def options(kernel: str, sizes: LayerSizes | Rows) -> tuple[str, ...]:
    """The macros of a kernel."""
    warps, blocks = warps_and_blocks(kernel, sizes)
    macros = {"WARPS": warps, "BLOCKS": blocks} | sizes.macros(kernel)
    return tuple(f"--define-macro={name}={value}" for name, value in macros.items())


@functools.cache
def source(kernel: str) -> tuple[pathlib.Path, tuple[pathlib.Path, ...]]:
    """A kernel's file and those that it includes."""
    return FOLDER / f"{kernel}.cu", tuple(sorted(FOLDER.glob("*.h")))


@functools.cache
def ptx(kernel: str, sizes: LayerSizes | Rows) -> str:
    """A kernel's PTX. Raises NvrtcError."""
    return nvrtc.ptx_of(*source(kernel), options(kernel, sizes))


class Means(NamedTuple):
    """The means that a machine has for the kernels of some sizes."""

    obstacle: str | None
    """The reason why the kernels cannot be compiled, or None."""
    handler: bool
    """True if XLA has the handler that launches them."""


@functools.cache
def own_means(sizes: LayerSizes | Rows) -> Means:
    """The means of this machine. All kernels are compiled at once, so that training does not find out later."""
    try:
        for kernel in sizes.kernels:
            ptx(kernel, sizes)
    except nvrtc.NvrtcError as error:
        return Means(str(error), False)
    return Means(None, handler_library() is not None)


_agreed: dict[LayerSizes | Rows, Means] = {}


def agree(sizes: LayerSizes | Rows, common: Means) -> None:
    """The means that all processes of a run have, for each of them to go by (training/agreement.py)."""
    _agreed[sizes] = common


def means(sizes: LayerSizes | Rows) -> Means:
    """The means to go by for layers of these sizes: of several processes, those that all of them have."""
    if jax.process_count() == 1:
        return own_means(sizes)
    return _agreed.get(sizes, Means(NOT_AGREED, False))


@functools.cache
def handler_library() -> ctypes.CDLL | None:
    """The compiled handler; XLA knows it from then on. None where there is no C compiler."""
    include = pathlib.Path(jax.ffi.include_dir())
    headers = (FOLDER.parent / "xla_ffi.h", include / "xla/ffi/api/c_api.h")
    without = "CUDA kernels are launched by an undocumented call of XLA's own"
    library = c_compiler.library(FOLDER / "launch.c", ("-std=gnu11", "-O2", f"-I{include}"), headers, without=without)
    if library is not None:
        capsule = jax.ffi.pycapsule(library.launch_cuda)
        jax.ffi.register_ffi_target(HANDLER, {"initialize": capsule, "execute": capsule}, platform="CUDA")
    return library


def launch(
    kernel: str,
    sizes: LayerSizes | Rows,
    arrays: Sequence[Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: int,
    shared: int,
) -> list[Array]:
    """The results of a kernel for arrays.

    Args:
        grid: blocks.
        shared: bytes of shared memory that a block takes.
    """
    threads = 32 * warps_and_blocks(kernel, sizes)[0]
    by = by_handler if means(sizes).handler else by_ptx_call
    return by(kernel, ptx(kernel, sizes), results, grid, threads, shared)(*arrays)


def by_handler(
    kernel: str, text: str, results: Sequence[jax.ShapeDtypeStruct], grid: int, threads: int, shared: int
) -> Callable[..., list[Array]]:
    """A kernel's launch by the handler of launch.c."""
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    numbers = {"grid": np.int32(grid), "block": np.int32(threads), "shared": np.int32(shared), "key": np.int64(key)}
    call = jax.ffi.ffi_call(HANDLER, list(results), vmap_method="sequential")
    return functools.partial(call, kernel=kernel, image=text, **numbers)


def by_ptx_call(
    kernel: str, text: str, results: Sequence[jax.ShapeDtypeStruct], grid: int, threads: int, shared: int
) -> Callable[..., list[Array]]:
    """A kernel's launch by XLA's own call."""
    numbers = {"grid_x": grid, "grid_y": 1, "grid_z": 1, "block_x": threads, "block_y": 1, "block_z": 1}
    numbers["shared_mem_bytes"] = shared
    fields = ", ".join(f"{name} = {value} : i32" for name, value in numbers.items())
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\0A").replace("\t", "\\09")
    return jax.ffi.ffi_call(
        "__gpu$xla.gpu.ptx",
        list(results),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=f'{{name = "{kernel}", kernel_type = "ptx", kernel_data = "{text}", {fields}}}',
    )
