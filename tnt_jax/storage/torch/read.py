"""A PyTorch checkpoint to parameters of ours: the file, what is in it, and whether all of it was understood."""

import argparse
import json
import math
import pickle
import re
import zipfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.variants import VARIANTS, model_config
from tnt_jax.storage.folder import ModelDescription, description_from_dict, parameter_shapes
from tnt_jax.storage.torch.layouts import ARCHITECTURES, UNUSED, from_layout, layout_shapes, tensor_names

TORCH_SUFFIXES = (".pth", ".pth.tar", ".pt", ".bin")
METADATA_KEY = "tnt_jax"  # where a .safetensors file that we wrote holds the description of its model
EMA_KEYS, RAW_KEYS = ("state_dict_ema", "model_ema"), ("state_dict", "model")
_WRAPPERS = re.compile(r"^(_orig_mod\.)?(module\.)?(_orig_mod\.)?")  # torch.compile, DistributedDataParallel


def read_file(
    path: Path, weights: Literal["raw", "ema"] | None = None
) -> tuple[dict[str, np.ndarray], ModelDescription | None]:
    """The tensors of a checkpoint by name, unwrapped in timm's order, and the description if the file is one of ours.

    Args:
        path: .safetensors, or a PyTorch file, of which only data is unpickled.
        weights: which to take of a training checkpoint that has both; by default the averaged ones where there are any.

    Raises:
        InputError: the file is missing, damaged or no checkpoint, would run code, or PyTorch is needed and missing.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a checkpoint is a file; --to makes one from the folder of a model")
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        return _unwrap(path, tensors, weights), _description(path, metadata)
    if not path.name.endswith(TORCH_SUFFIXES):
        raise InputError(f"{path} is none of .safetensors, {', '.join(TORCH_SUFFIXES)}")
    tensors = _unwrap(path, _read_torch(path), weights)
    if strangers := [name for name, value in tensors.items() if not hasattr(value, "detach")]:
        raise InputError(f"{path} is no state dict: {', '.join(strangers)} are not tensors")
    return {name: _to_numpy(tensor) for name, tensor in tensors.items()}, None


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


def _description(path: Path, metadata: Mapping[str, str]) -> ModelDescription | None:
    if METADATA_KEY not in metadata:
        return None
    try:
        return description_from_dict(json.loads(metadata[METADATA_KEY]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the description of the model in {path} is damaged: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"PyTorch is needed to read {path.name}, and is not installed: pip install torch "
            "--index-url https://download.pytorch.org/whl/cpu. A .safetensors file is read without it"
        ) from error
    try:
        # PyTorch does not look at the checksums in its files.
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise InputError(f"{path} is damaged: the checksum of {damaged} in it is wrong")
        # timm's and huawei's training scripts put their arguments into a checkpoint, as a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path} holds {unsafe[1]}, which is not plain data: reading it could run code, so it is not read. "
                "Whoever trusts it can save its state dict alone, with torch.save(model.state_dict(), ...)"
            ) from error
        raise InputError(f"{path} is damaged or no PyTorch file") from error
    except InputError:
        raise
    except Exception as error:  # nearly everything is raised for a damaged file
        raise InputError(
            f"{path} is damaged or no PyTorch file: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error


def _to_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _unwrap(path: Path, checkpoint: Any, weights: str | None) -> dict[str, Any]:
    """The state dict in a checkpoint.

    Source of the order: timm/models/_helpers.py, load_state_dict and clean_state_dict.
    """
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"{path} holds a {type(checkpoint).__name__} and no state dict")
    keys = {None: EMA_KEYS + RAW_KEYS, "raw": RAW_KEYS, "ema": EMA_KEYS}[weights]
    found = next((key for key in keys if isinstance(checkpoint.get(key), Mapping)), None)
    if weights == "ema" and found is None:
        raise InputError(f"{path} has no averaged weights: none of {', '.join(EMA_KEYS)} is in it")
    state_dict = checkpoint if found is None else checkpoint[found]
    return {_WRAPPERS.sub("", name): value for name, value in state_dict.items()}


def recognise_layout(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The layout of a state dict, from the names of its tensors.

    Raises:
        InputError: it is no TNT and no PyramidTNT.
    """
    markers = {"mmpretrain": "backbone.pixel_pos", "huawei": "inner_pos", "timm": "pixel_pos"}
    for layout, marker in markers.items():
        if marker in shapes and (_is_pyramid(shapes) or tensor_names("class_token", layout)[0] in shapes):
            return layout
    raise InputError(
        f"this is the state dict of another network ({len(shapes)} tensors: {', '.join(list(shapes)[:4])} ...); "
        "a TNT has a class token and " + ", ".join(f"{marker} ({layout})" for layout, marker in markers.items()) + ", "
        f"a PyramidTNT inner_pos and {_PYRAMID_MARKER}"
    )


_PYRAMID_MARKER = "stages.0.relative_pos"


def _is_pyramid(names: Container[str]) -> bool:
    return _PYRAMID_MARKER in names


def recognise_config(
    layout: str, shapes: Mapping[str, tuple[int, ...]], image_size: tuple[int, int] | None = None
) -> ModelConfig:
    """The published model whose state dict this is, with its image size, channels and classes, from its shapes.

    Args:
        image_size: what the model is wanted for. A file does not say how many rows and columns its positions have: they
            are taken for a square, or if they cannot be one, for this.

    Raises:
        InputError: it has none of the published sizes.
    """

    def shape(path: str, rank: int) -> tuple[int, ...]:
        (name,) = tensor_names(path, layout)
        if len(shapes.get(name, ())) != rank:
            raise InputError(f"{name} has shape {shapes.get(name)}, and in a TNT it has {rank} dimensions")
        return shapes[name]

    pyramid = _is_pyramid(shapes)
    architecture = "pyramid" if pyramid else ARCHITECTURES[layout][0]
    if layout == "timm" and "blocks.0.norm2_proj.weight" not in shapes:
        architecture = "legacy"
    outer_dim = shape("sentence_positions" if pyramid else "class_token", 3)[-1]
    sentences = shape("sentence_positions", 3)[1]
    widths = {
        variant.config.name: np.atleast_1d(variant.config.outer_dim)[0]
        for variant in VARIANTS.values()
        if variant.config.architecture == architecture
    }
    name = next((name for name, width in widths.items() if width == outer_dim), None)
    if name is None:
        known = ", ".join(f"{width} ({name})" for name, width in widths.items())
        raise InputError(f"sentences of {outer_dim} channels are in no published model; known are {known}")
    config = VARIANTS[name].config
    head = tensor_names("head.bias", layout)[0]
    return model_config(
        name,
        image_size=_image_size(sentences if pyramid else sentences - 1, config.patch_size, image_size),
        in_channels=shape("stem.common.conv.kernel" if pyramid else "word_embedding.conv.kernel", 4)[1],
        num_classes=shape("head.bias", 1)[0] if head in shapes else 0,
    )


def _image_size(patches: int, patch_size: int, wanted: tuple[int, int] | None) -> tuple[int, int]:
    side = math.isqrt(patches)
    if side * side == patches:
        return side * patch_size, side * patch_size
    if wanted and (wanted[0] // patch_size) * (wanted[1] // patch_size) == patches:
        return wanted
    raise InputError(f"{patches} sentence positions are no square: give the image size that they were trained for")


def to_parameters(tensors: dict[str, np.ndarray], layout: str, config: ModelConfig) -> dict[str, jax.Array]:
    """All tensors of a state dict as all parameters of a configuration.

    They are taken out of `tensors` one after the other, so that no more than one of them is in memory twice.

    Raises:
        InputError: they are of the other family, or a tensor is left over, missing, of the wrong shape, or not finite;
            the message lists every one.
    """
    pyramids = _is_pyramid(tensors), config.architecture == "pyramid"
    family, wanted = ("PyramidTNT" if pyramid else "TNT" for pyramid in pyramids)
    if family != wanted:
        raise InputError(f"these are the weights of a {family}, and {config.name} is a {wanted}")
    shapes = parameter_shapes(config)
    expected = layout_shapes({path: of.shape for path, of in shapes.items()}, layout)
    faults = [f"{name} {tensors[name].shape} is not in this model" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if UNUSED.fullmatch(name):
            continue
        if name not in tensors:
            faults.append(f"{name} {shape} is missing")
        elif tensors[name].shape != shape:
            faults.append(f"{name} is {tensors[name].shape}, and should be {shape}")
        elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            faults.append(f"{name} is {tensors[name].dtype}, and should be of floating point")
        elif not np.isfinite(tensors[name]).all():
            faults.append(f"{name} has values that are NaN or infinite")
    if faults:
        raise InputError(
            f"this is no {config.name} as {layout} names it; nothing was converted:\n  " + "\n  ".join(faults)
        )
    return {path: jnp.asarray(from_layout(tensors.pop, path, layout), of.dtype) for path, of in shapes.items()}
