"""Functions in C that XLA calls on CPUs.

Arrays are float32 or bfloat16, arithmetic is float32.
"""

import concurrent.futures
import functools
import pathlib
import platform
from collections.abc import Sequence

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

from tnt_jax import c_compiler
from tnt_jax.models.formulations.devices import mesh_obstacle
from tnt_jax.models.formulations.devices import platform as platform_of_program

FOLDER = pathlib.Path(__file__).parent


FUNCTIONS = {
    "inner_layer": ("inner_layer_forward", "inner_layer_gradient"),
    "attention": ("attention_forward", "attention_gradient"),
    "transpose": ("transpose",),
}


def compiled(name: str) -> bool:
    """True if this machine has compiled the file NAME.c; XLA knows its functions from then on."""
    return name in _compiled()


@functools.cache
def _compiled() -> frozenset[str]:
    """The files that this machine has compiled: all of them side by side, for a network needs each at once."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return frozenset(name for name, done in zip(FUNCTIONS, pool.map(_compile, FUNCTIONS), strict=True) if done)


def _compile(name: str) -> bool:
    include = pathlib.Path(jax.ffi.include_dir())
    headers = (FOLDER / "lanes.h", FOLDER / "xla_call.h", FOLDER.parent / "xla_ffi.h", include / "xla/ffi/api/c_api.h")
    processor = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    # Roots that set no errno are vector instructions.
    flags = ("-std=gnu11", "-O3", processor, "-fno-math-errno", f"-I{include}")
    library = c_compiler.library(FOLDER / f"{name}.c", flags, headers, without="a network takes a fifth longer")
    if library is None:
        return False
    for function in FUNCTIONS[name]:
        capsule = jax.ffi.pycapsule(getattr(library, function))
        jax.ffi.register_ffi_target(f"tnt_jax_{function}", capsule, platform="cpu")
    return True


def obstacle(name: str, dtype: DTypeLike, count: int) -> str | None:
    """The reason why the functions of a file cannot run on `count` rows of this dtype here, or None."""
    if platform_of_program() != "cpu":
        return f"native runs on CPUs, and this is a {platform_of_program()}"
    if dtype not in ("float32", "bfloat16"):
        return f"native takes float32 and bfloat16, and this is {dtype}"
    return mesh_obstacle(count) or (None if compiled(name) else f"{name}.c could not be compiled")


Like = Array | jax.ShapeDtypeStruct


def call(function: str, like: Like | Sequence[Like], *arguments: Array, **attributes) -> Array | Sequence[Array]:
    """The results of a function for these arguments: arrays like `like`."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), like)
    run = jax.ffi.ffi_call(f"tnt_jax_{function}", shapes, vmap_method="sequential")
    return run(*arguments, **attributes)
