"""C, compiled once on the machine that it runs on, when it is first needed, into the user's cache.

A compiled library is code that this process will run, so what lies in the cache is loaded only if nobody else can have
written it, and only if it is whole: its name has the checksum of its content.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence

from tnt_jax.user_cache import UnsafeCacheError, cache_folder, ours_alone

log = logging.getLogger(__name__)

# Lines of /proc/cpuinfo that say what a processor can do: of x86, of ARM, of RISC-V and of POWER.
PROCESSOR_LINES = (
    "vendor_id", "cpu family", "model", "model name", "flags",
    "Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision",
    "isa", "uarch", "cpu",
)  # fmt: skip


@functools.cache
def library(
    source: pathlib.Path, flags: tuple[str, ...], headers: tuple[pathlib.Path, ...] = (), *, without: str
) -> ctypes.CDLL | None:
    """The library that the machine's C compiler (`$CC`, or cc) makes of a file, for this processor.

    A library in the cache that is damaged, that cannot be loaded or that others could have written is compiled again.
    Where the cache belongs to another user or cannot be written, the library is compiled into a folder of this process.

    Args:
        flags: for the compiler, beside those that make a shared library.
        headers: what the file includes; it is compiled anew when one of them changes.
        without: what is said in the log, once, where it cannot be compiled.

    Returns:
        The library, or None where it cannot be compiled.
    """
    flags = (*flags, "-fPIC", "-shared")
    texts = [file.read_bytes() for file in (source, *headers)]
    key = hashlib.sha256(b"".join(texts) + repr((flags, _machine(), _compiler())).encode()).hexdigest()[:16]
    try:
        try:
            folder = cache_folder()
        except (UnsafeCacheError, OSError) as error:
            log.warning("%s is compiled for this process alone: %s", source.name, error)
            with tempfile.TemporaryDirectory() as folder:
                return ctypes.CDLL(str(_compiled(source, flags, pathlib.Path(folder), source.stem)))
        return _from_cache(source, flags, folder, f"{source.stem}-{key}")
    except subprocess.CalledProcessError as error:
        log.warning("%s: the C compiler cannot compile %s: %s", without, source.name, error.stderr.decode().strip())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning("%s: %s is not compiled: %s", without, source.name, error)
    return None


def _from_cache(source: pathlib.Path, flags: Sequence[str], folder: pathlib.Path, name: str) -> ctypes.CDLL:
    for path in sorted(folder.glob(f"{name}-*.so")):
        # Loading a file that was cut short is a bus error, which nobody can catch.
        if ours_alone(path) and path.stem == f"{name}-{checksum(path)}":
            with contextlib.suppress(OSError):  # such as another libc's
                return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    return ctypes.CDLL(str(_compiled(source, flags, folder, name)))


def checksum(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compiled(source: pathlib.Path, flags: Sequence[str], into: pathlib.Path, name: str) -> pathlib.Path:
    with tempfile.TemporaryDirectory(dir=into) as folder:  # others may be compiling it at the same time
        made = pathlib.Path(folder) / f"{name}.so"
        command = [*_command(), *flags, str(source), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        made.chmod(0o700)
        return made.replace(into / f"{name}-{checksum(made)}.so")


def _command() -> list[str]:
    """The compiler with its arguments: `CC="ccache gcc"` has one."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def _compiler() -> tuple[str, ...]:
    """The compiler and its version; without a version where it does not say one, or is not there."""
    command = _command()
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, timeout=30)
        return (*command, done.stdout.decode(errors="replace").partition("\n")[0])
    except (OSError, subprocess.SubprocessError):
        return tuple(command)


@functools.cache
def processor_lines() -> tuple[str, ...]:
    """The instruction sets of the processors as Linux lists them, each line once; empty elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(sorted({line for line in lines if line.partition(":")[0].strip() in PROCESSOR_LINES}))


def processor_flags() -> frozenset[str]:
    """The names of the instruction sets that every processor of this machine has: `avx2`, or on ARM `asimd`."""
    sets = [set(text.split()) for line in processor_lines() for name, _, text in [line.partition(":")]
            if name.strip() in ("flags", "Features", "isa")]  # fmt: skip
    return frozenset(set.intersection(*sets)) if sets else frozenset()


def _machine() -> tuple:
    """The machine that a library was compiled for: a home folder may be shared by machines of several kinds."""
    return platform.system(), platform.machine(), platform.processor(), platform.libc_ver(), processor_lines()
