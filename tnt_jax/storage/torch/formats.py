"""The tensors in a checkpoint file, whatever its name is: files are known by what they begin with."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tnt_jax.config import InputError
from tnt_jax.storage.torch.pth import Tensor, UnsupportedTensor, is_legacy, is_zip, read_pth
from tnt_jax.storage.torch.unpickle import Damaged

_SAFETENSORS_DTYPES = {  # safetensors' names of what NumPy and ml_dtypes have
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# How a file begins -> what it is, and what to do.
_OTHERS = {
    b"version https://git-lfs.github.com": "a git-lfs pointer to the file: fetch the file itself with `git lfs pull`",
    b"\x89HDF": "an HDF5 file (Keras, TensorFlow); weights of TNT are read from PyTorch and safetensors files",
    b"\x1f\x8b": "compressed with gzip: unpack it first, with gunzip or tar",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\x93NUMPY": "a NumPy array",
}


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in a .safetensors file that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    numpy: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    content: Any
    """Nested dictionaries and lists of `Tensor`, `FileTensor`, `UnsupportedTensor` and plain values."""
    metadata: Mapping[str, str]
    """Of a .safetensors file."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a .safetensors file, or a file of `torch.save`. Tensors are read when asked for.

    Raises:
        InputError: the file is missing or damaged, or is something else; the message says what it is.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a checkpoint is a file")
    try:
        with path.open("rb") as file:
            start = file.read(1024)
        if is_zip(start) or is_legacy(start):
            return Checkpoint(read_pth(path), {})
        if start[8:9] == b"{":
            return _read_safetensors(path)
    except Damaged as error:
        raise InputError(f"{path} is damaged or no PyTorch file: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    raise InputError(f"{path} is {what_it_is(start)}")


def what_it_is(start: bytes) -> str:
    """The kind of a file that is no checkpoint, from its first 1,024 bytes."""
    if not start:
        return "empty"
    for magic, words in _OTHERS.items():
        if start.startswith(magic):
            return words
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it and give the checkpoint that is in it"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not a checkpoint: the address or the login was wrong when it was downloaded"
    if text.startswith(b"{"):
        return "JSON, not a checkpoint; weights in several files with an index have to be joined into one first"
    if start[:1] == b"\x80":
        return "a pickle that torch.save did not write; save it with torch.save(model.state_dict(), FILE)"
    return "no checkpoint: neither safetensors nor a file that torch.save wrote"


def _read_safetensors(path: Path) -> Checkpoint:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: _file_tensor(path, file, name) for name in file.keys()}  # noqa: SIM118
            return Checkpoint(tensors, file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


def _file_tensor(path: Path, file: Any, name: str) -> FileTensor | UnsupportedTensor:
    known = file.get_slice(name)
    dtype = known.get_dtype()
    if dtype not in _SAFETENSORS_DTYPES:
        return UnsupportedTensor(f"of the dtype {dtype}")

    def read() -> np.ndarray:
        import safetensors

        # Opened anew, for an open file stays in memory with all that was read of it.
        with safetensors.safe_open(path, framework="numpy") as again:
            return again.get_tensor(name)

    return FileTensor(tuple(known.get_shape()), np.dtype(_SAFETENSORS_DTYPES[dtype]), read)


def is_tensor(value: Any) -> bool:
    """True for a tensor of a checkpoint, readable or not."""
    return isinstance(value, Tensor | FileTensor | UnsupportedTensor)
