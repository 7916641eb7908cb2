"""The one place that calls a CUDA kernel from a program of JAX.

The PTX stands in the program, as an argument of `__gpu$xla.gpu.ptx`, a custom call of XLA's own: its ptxas assembles
the kernel with the program, and no code of ours runs on the host. XLA has tests of that call and no documentation, so
it may change: `launch` alone would then become a typed FFI handler that loads and launches the kernel.
"""

import functools
import pathlib
from collections.abc import Sequence

import jax
from jaxtyping import Array

from tnt_jax.models.kernels.gpu import nvrtc
from tnt_jax.models.kernels.gpu.sizes import Sizes

FOLDER = pathlib.Path(__file__).parent
KERNELS = ("inner_forward", "inner_mlp_gradient", "inner_attention_gradient")


def warps_and_blocks(kernel: str, sizes: Sizes) -> tuple[int, int]:
    """Warps of a block, and blocks that a multiprocessor is to hold: the registers of a thread follow from them."""
    if kernel != "inner_forward":
        return 8, 1
    return (8, 2) if sizes.channels <= 32 else (12, 1)


def options(kernel: str, sizes: Sizes) -> tuple[str, ...]:
    """The macros of a kernel."""
    warps, blocks = warps_and_blocks(kernel, sizes)
    macros = {"WARPS": warps, "BLOCKS": blocks, "WORDS": sizes.words, "CHANNELS": sizes.channels}
    macros |= {"HEADS": sizes.heads, "HIDDEN": sizes.hidden, "EPSILON": f"{sizes.epsilon}f"}
    return tuple(f"--define-macro={name}={value}" for name, value in macros.items())


@functools.cache
def source(kernel: str) -> tuple[pathlib.Path, tuple[pathlib.Path, ...]]:
    """A kernel's file and those that it includes."""
    return FOLDER / f"{kernel}.cu", tuple(sorted(FOLDER.glob("*.h")))


@functools.cache
def ptx(kernel: str, sizes: Sizes) -> str:
    """A kernel's PTX. Raises NvrtcError."""
    return nvrtc.ptx(*source(kernel), options(kernel, sizes))


@functools.cache
def obstacle(sizes: Sizes) -> str | None:
    """Why the kernels cannot be compiled for these sizes here, or None: all of them, so that training does not find out
    later."""
    try:
        for kernel in KERNELS:
            ptx(kernel, sizes)
    except nvrtc.NvrtcError as error:
        return str(error)
    return None


def launch(
    kernel: str,
    sizes: Sizes,
    arrays: Sequence[Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: int,
    shared: int,
) -> list[Array]:
    """What a kernel makes of arrays.

    Args:
        grid: blocks.
        shared: bytes of shared memory that a block takes.
    """
    warps, _ = warps_and_blocks(kernel, sizes)
    numbers = {"grid_x": grid, "grid_y": 1, "grid_z": 1, "block_x": 32 * warps, "block_y": 1, "block_z": 1}
    numbers["shared_mem_bytes"] = shared
    fields = ", ".join(f"{name} = {value} : i32" for name, value in numbers.items())
    text = ptx(kernel, sizes).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\0A").replace("\t", "\\09")
    call = jax.ffi.ffi_call(
        "__gpu$xla.gpu.ptx",
        list(results),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=f'{{name = "{kernel}", kernel_type = "ptx", kernel_data = "{text}", {fields}}}',
    )
    return call(*arrays)
