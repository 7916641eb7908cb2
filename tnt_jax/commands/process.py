"""The settings that a command gives its own process before JAX starts. A library call leaves the process as it is."""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import platform
import sys
import traceback
from collections.abc import Iterator

from tnt_jax.user_cache import UnsafeCacheError, cache_folder

# <malloc.h> of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def use_cpu_where_there_is_nothing_else() -> None:
    """Keeps JAX from looking for a TPU on a machine that has none, for which libtpu prints a page of warnings."""
    if not os.environ.get("JAX_PLATFORMS") and _on_cpu_alone():
        os.environ["JAX_PLATFORMS"] = "cpu"


def of_accelerator(error: Exception) -> str | None:
    """JAX's error in plain words where an accelerator does not answer or is full, with a remedy; None for others."""
    first = next(iter(str(error).splitlines()), "")
    if first.startswith("RESOURCE_EXHAUSTED"):
        return (
            f"{first}\nA smaller --batch-size needs less memory; so do, in training, --accumulation-steps, "
            "--model.remat all and --fsdp, and train.py --plan says what fits"
        )
    frames = traceback.extract_tb(error.__traceback__)
    if frames and pathlib.Path(frames[-1].filename).name == "xla_bridge.py":  # where JAX looks for devices
        asked = os.environ.get("JAX_PLATFORMS")
        why = f": {first}" if first else ", and does not say why; its driver, or JAX's package for it, may be missing"
        return (
            f"JAX cannot use {f'JAX_PLATFORMS={asked}' if asked else 'the accelerator'} here{why}. "
            "JAX_PLATFORMS=cpu computes on the processor"
        )
    return None


def keep_memory() -> None:
    """Lets a process that computes on a CPU keep the memory that it frees, for its next step.

    XLA allocates all that a step needs at once and frees it at its end. The C library would give it back to the system,
    which hands it out anew page by page, zeroed: a sixth of a training step of TNT-S. It keeps it for the main thread,
    which therefore has to compute itself, and the process stays as large as it has been at most. To be called before
    JAX is first used. Other C libraries than glibc, and processes that may have an accelerator, are left as they are.
    """
    if platform.libc_ver()[0] == "glibc" and _on_cpu_alone():
        import jax

        c_library = ctypes.CDLL(None)
        c_library.mallopt(M_MMAP_MAX, 0)
        c_library.mallopt(M_TRIM_THRESHOLD, -1)
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def use_compilation_cache() -> None:
    """Keeps what is compiled for the next start, in the user's cache unless JAX_COMPILATION_CACHE_DIR says where."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        try:
            folder = cache_folder()
        except (UnsafeCacheError, OSError):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    if jax.config.jax_compilation_cache_max_size < 0:
        jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)  # bytes; JAX sets no limit
    _drop_half_entries(pathlib.Path(jax.config.jax_compilation_cache_dir))


def _drop_half_entries(folder: pathlib.Path) -> None:
    """Removes the programs of a cache that have no time of last use.

    A process killed between writing the one and the other leaves such an entry, which makes JAX fail to write any.
    """
    if not folder.is_dir():  # also one that is elsewhere, such as gs://
        return
    import filelock

    with contextlib.suppress(OSError), filelock.FileLock(folder / ".lockfile", timeout=5):  # JAX's own
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
                program.unlink()


@functools.cache
def quiet_orbax() -> None:
    """Keeps Orbax from printing pages, in threads and of what it left half read, on what becomes one message here."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    others = sys.unraisablehook

    def hook(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        left = (code and "orbax" in code.co_filename) or str(unraisable.exc_value) == "Event loop is closed"
        if not left:
            others(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Shows what the library has to say while a command runs, one line each."""
    logger, handler = logging.getLogger("tnt_jax"), _Notes(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"note: {record.getMessage()}", file=sys.stderr, flush=True)


def _chips() -> list[pathlib.Path]:
    """The TPU chips of this machine, as Linux shows them."""
    return [path for pattern in ("accel*", "vfio/[0-9]*") for path in pathlib.Path("/dev").glob(pattern)]


def _on_cpu_alone() -> bool:
    """True if JAX is told to use the CPU, or has nothing else: asking JAX itself would start its threads."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    has_tpu = importlib.util.find_spec("libtpu") is not None and _chips()
    return not importlib.metadata.entry_points(group="jax_plugins") and not has_tpu
