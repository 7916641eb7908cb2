"""A model as a float32 state dict in a published layout: .safetensors, or .pth as `torch.save` writes it."""

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from tnt_jax.config import InputError
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import ModelDescription, description_text
from tnt_jax.storage.files import write_whole
from tnt_jax.storage.folder import check_destination, description_with, model_parameters
from tnt_jax.storage.torch.layouts import ARCHITECTURES, DETR_HEAD, to_layout
from tnt_jax.storage.torch.read import METADATA_KEY

Layout = Literal["huawei", "timm", "mmpretrain", "transformers"]
ALIGNMENT = 64  # bytes, of each tensor in a file, as torch.save has it
_STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}


def export(model: Model, destination: str | os.PathLike, layout: Layout, *, overwrite: bool = False) -> int:
    """Writes a model as a file that others read, and that comes back whatever its sizes are: it holds its description.

    Returns:
        How many tensors were written.

    Raises:
        InputError: the layout has no such architecture or lacks one of its modules, or the file exists or has another
            suffix.
    """
    path = Path(destination)
    if path.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{path} should end in .safetensors or .pth")
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a file is to be written")
    check_destination(path, overwrite=overwrite)
    tensors = state_dict(model, layout)
    write = write_safetensors if path.suffix == ".safetensors" else write_pth
    description = description_with(model)
    write_whole(path, lambda unfinished: write(tensors, description, unfinished))
    return len(tensors)


def state_dict(model: Model, layout: Layout) -> dict[str, np.ndarray]:
    """The parameters of a model by the names of a layout, in float32.

    Raises:
        InputError: the layout has no such architecture, or lacks one of its modules.
    """
    architecture = model.config.architecture
    if architecture not in ARCHITECTURES[layout]:
        able = [name for name, has in ARCHITECTURES.items() if architecture in has]
        kind = "PyramidTNT" if architecture == "pyramid" else f"{architecture} TNT"
        raise InputError(f"{layout} has no {kind}, which {model.config.name} is; it can go to {' or '.join(able)}")
    if layout == "transformers" and model.config.head != DETR_HEAD:
        raise InputError(
            f"transformers has a TNT as the backbone of a DETR, which is head {DETR_HEAD}, and {model.config.name} has "
            f"head {model.config.head}"
        )
    parameters = {name: np.asarray(value, np.float32) for name, value in model_parameters(model).items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in to_layout(parameters, layout).items()}


def write_safetensors(tensors: Mapping[str, np.ndarray], description: ModelDescription, path: Path) -> None:
    """Writes a state dict with the description in its metadata."""
    from safetensors.numpy import save_file

    # timm and mmpretrain ask for the format of the tensors in the metadata, as PyTorch's own writer gives it.
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt", METADATA_KEY: description_text(description)})
    path.chmod(mode)  # its writer gives the file to its owner alone


def write_pth(tensors: Mapping[str, np.ndarray], description: ModelDescription, path: Path) -> None:
    """Writes a state dict as `torch.save` does, with the description in its `_metadata`, where nobody else looks.

    Source: torch/serialization.py, _save.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", _pickled(tensors, description_text(description)))
        _add(archive, "byteorder", b"little")
        for key, tensor in enumerate(tensors.values()):
            _add(archive, f"data/{key}", tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes())
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    header = archive.fp.tell() + 30 + len(info.filename) + 4
    padding = -header % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(info, content)


def _pickled(tensors: Mapping[str, np.ndarray], description: str) -> bytes:
    """The pickle of an ordered dictionary of tensors, in protocol 2, whose opcodes Lib/pickletools.py describes."""
    parts = [pickle.PROTO, b"\x02", _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
    parts.append(pickle.MARK)
    for key, (name, tensor) in enumerate(tensors.items()):
        storage = (_text("storage"), _global("torch", _STORAGES[tensor.dtype]), _text(str(key)), _text("cpu"))
        strides = tuple(stride // tensor.itemsize for stride in tensor.strides)
        parts += [_text(name), _global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        parts += [pickle.MARK, *storage, _number(tensor.size), pickle.TUPLE, pickle.BINPERSID]
        parts += [_number(0), _sizes(tensor.shape), _sizes(strides), pickle.NEWFALSE]
        parts += [_global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
        parts += [pickle.TUPLE, pickle.REDUCE]
    parts.append(pickle.SETITEMS)
    metadata = (pickle.EMPTY_DICT, _text(METADATA_KEY), _text(description), pickle.SETITEM)
    parts += [pickle.EMPTY_DICT, _text("_metadata"), *metadata, pickle.SETITEM, pickle.BUILD, pickle.STOP]
    return b"".join(parts)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _number(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


def _sizes(sizes: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(map(_number, sizes)) + pickle.TUPLE
