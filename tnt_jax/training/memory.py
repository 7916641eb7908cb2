"""What a process that computes on a CPU does with memory between its steps."""

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import platform

import jax

# <malloc.h> of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Lets a process that computes on a CPU keep the memory that it frees, for its next step.

    XLA allocates all that a step needs at once and frees it at its end. The C library would give it back to the system,
    which hands it out anew page by page, zeroed: a sixth of a training step of TNT-S. It keeps it for the main thread,
    which therefore has to compute itself, and the process stays as large as it has been at most. To be called before
    JAX is first used. Other C libraries than glibc, and processes that may have an accelerator, are left as they are.
    """
    if platform.libc_ver()[0] == "glibc" and _on_cpu_alone():
        c_library = ctypes.CDLL(None)
        c_library.mallopt(M_MMAP_MAX, 0)
        c_library.mallopt(M_TRIM_THRESHOLD, -1)
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _chips() -> list[pathlib.Path]:
    """The TPU chips of this machine, as Linux shows them."""
    return [path for pattern in ("accel*", "vfio/[0-9]*") for path in pathlib.Path("/dev").glob(pattern)]


def _on_cpu_alone() -> bool:
    """Whether JAX is told to use the CPU, or has nothing else: asking JAX itself would start its threads."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    has_tpu = importlib.util.find_spec("libtpu") is not None and _chips()
    return not importlib.metadata.entry_points(group="jax_plugins") and not has_tpu
