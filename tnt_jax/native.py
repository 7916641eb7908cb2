"""C, compiled once on the machine that it runs on, when it is first needed, into `~/.cache/tnt_jax`."""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence

log = logging.getLogger(__name__)


@functools.cache
def library(
    source: pathlib.Path, flags: tuple[str, ...], headers: tuple[pathlib.Path, ...] = (), *, without: str
) -> ctypes.CDLL | None:
    """What the machine's C compiler (`$CC`, or cc) makes of a file, for this processor.

    Args:
        flags: for the compiler, beside those that make a shared library.
        headers: what the file includes; it is compiled anew when one of them changes.
        without: what is said in the log, once, where it cannot be compiled.

    Returns:
        The library, or None where it cannot be compiled.
    """
    flags = (*flags, "-fPIC", "-shared")
    texts = [file.read_bytes() for file in (source, *headers)]
    version = hashlib.sha256(b"".join(texts) + repr((flags, _processor())).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tnt_jax"
    path = cache / f"{source.stem}-{version}.so"
    try:
        if not path.exists():
            _compile(source, flags, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        log.warning("%s: the C compiler cannot compile %s: %s", without, source.name, error.stderr.decode().strip())
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s: %s is not compiled: %s", without, source.name, error)
    return None


def _compile(source: pathlib.Path, flags: Sequence[str], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # others may be compiling it at the same time
        made = pathlib.Path(folder) / path.name
        command = [os.environ.get("CC", "cc"), *flags, str(source), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        made.replace(path)


@functools.cache
def processor_flags() -> str:
    """The instruction sets of an x86 processor under Linux, in one line; empty elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def _processor() -> tuple[str, ...]:
    """What a library was compiled for: a home folder may be shared by machines of several kinds."""
    return platform.system(), platform.machine(), platform.processor(), processor_flags()
