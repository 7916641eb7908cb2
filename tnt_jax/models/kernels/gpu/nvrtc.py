"""CUDA C++, compiled to PTX by NVRTC when it is first needed, into `~/.cache/tnt_jax` as C is (c_compiler.py).

NVRTC is one library, which `jax[cuda13]` brings; it needs no GPU, no headers and no other compiler.
"""

import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import importlib.util
import pathlib
import re
import tempfile
from collections.abc import Sequence

from tnt_jax.c_compiler import UnsafeCacheError, cache_folder, checksum, ours_alone

NOT_INSTALLED = "NVRTC is not installed: pip install nvidia-cuda-nvrtc, or jax[cuda13], which brings it"
PTX_VERSION = "8.0"
"""Newer than all that the kernels use, and older than every driver that JAX runs on."""


class NvrtcError(RuntimeError):
    """NVRTC is not there, or it refused a source; the message is one line."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else []
    found = [path for folder in folders for path in pathlib.Path(folder).glob("*/lib/libnvrtc.so.*")]
    names = [str(path) for path in sorted(found)] + [ctypes.util.find_library("nvrtc")]
    for name in filter(None, names):
        with contextlib.suppress(OSError):
            for builtins in pathlib.Path(name).parent.glob("libnvrtc-builtins.so.*"):  # NVRTC 13.0 has no RPATH to it
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(name)
    return None


def ptx_of(source: pathlib.Path, headers: Sequence[pathlib.Path], options: tuple[str, ...]) -> str:
    """The PTX of a file for `compute_80` and everything newer, from the cache if it has been compiled before.

    A file of the cache that is damaged or that others could have written is compiled again. Where the cache belongs to
    another user or cannot be written, it is compiled for this process alone.

    Raises:
        NvrtcError: it cannot be compiled.
    """
    nvrtc = _loaded()
    texts = [file.read_bytes() for file in (source, *headers)]
    key = hashlib.sha256(b"".join(texts) + repr((options, PTX_VERSION, _version(nvrtc))).encode()).hexdigest()[:16]
    try:
        folder = cache_folder()
    except (UnsafeCacheError, OSError):
        return _as_ptx(source, headers, options)
    for path in sorted(folder.glob(f"{source.stem}-{key}-*.ptx")):
        if ours_alone(path) and path.stem == f"{source.stem}-{key}-{checksum(path)}":
            return path.read_text()
        path.unlink(missing_ok=True)
    text = _as_ptx(source, headers, options)
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=folder) as beside:  # of a full disk
        made = pathlib.Path(beside) / "made"
        made.write_text(text)
        made.chmod(0o600)
        made.replace(folder / f"{source.stem}-{key}-{checksum(made)}.ptx")
    return text


def _as_ptx(source: pathlib.Path, headers: Sequence[pathlib.Path], options: tuple[str, ...]) -> str:
    text = compile_source(source, headers, "compute_80", options)[0].decode()
    # NVRTC names the newest version that it knows, which a driver of last year refuses.
    return re.sub(r"^\.version .*$", f".version {PTX_VERSION}", text, count=1, flags=re.M)


def compile_source(
    source: pathlib.Path, headers: Sequence[pathlib.Path], architecture: str, options: tuple[str, ...]
) -> tuple[bytes, str]:
    """PTX for an architecture such as `compute_80`, machine code for one such as `sm_90a`, and what NVRTC said of it.

    Raises:
        NvrtcError: it cannot be compiled.
    """
    nvrtc, program = _loaded(), ctypes.c_void_p()
    count = len(headers)
    contents = (ctypes.c_char_p * count)(*(file.read_bytes() for file in headers))
    names = (ctypes.c_char_p * count)(*(file.name.encode() for file in headers))
    flags = [flag.encode() for flag in (f"--gpu-architecture={architecture}", "--std=c++17", *options)]
    text = source.read_bytes()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), count, contents, names):
        raise NvrtcError(f"NVRTC cannot read {source.name}")
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        log = _text(nvrtc, program, "ProgramLog").decode(errors="replace")
        if failed:
            reason = next((line for line in log.splitlines() if "error" in line), f"error {failed}")
            raise NvrtcError(f"NVRTC cannot compile {source.name} for {architecture}: {reason.strip()}")
        return _text(nvrtc, program, "PTX" if architecture.startswith("compute") else "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _loaded() -> ctypes.CDLL:
    if nvrtc := _library():
        return nvrtc
    raise NvrtcError(NOT_INSTALLED)


def _version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
        raise NvrtcError(f"NVRTC has no {what}")
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw.removesuffix(b"\0") if what != "CUBIN" else buffer.raw
