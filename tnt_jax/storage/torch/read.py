"""A PyTorch checkpoint to parameters of ours: what is in it, and whether all of it was understood."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.data.classes import named_classes
from tnt_jax.models.heads import OF_CLASSES, OfClasses
from tnt_jax.models.variants import VARIANTS, model_config
from tnt_jax.storage.description import ModelDescription, description_from_dict
from tnt_jax.storage.folder import check_count, parameter_shapes
from tnt_jax.storage.torch.formats import is_tensor, read_checkpoint
from tnt_jax.storage.torch.layouts import (
    ARCHITECTURES,
    DETR_HEAD,
    OURS,
    UNUSED,
    from_layout,
    layout_shapes,
    tensor_names,
)
from tnt_jax.storage.torch.pth import Tensor, UnsupportedTensor, kind_of
from tnt_jax.storage.torch.unpickle import Damaged
from tnt_jax.storage.torch.wrappings import StateDict, find_state_dict

METADATA_KEY = "tnt_jax"  # where a file that we wrote holds the description of its model
COUNTERS = re.compile(r"steps|n_averaged")  # of mmengine's and PyTorch's averaged models
FLOATING = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Found:
    """The state dict in a file and what the file says of it."""

    tensors: dict[str, Any]
    """By the names of a layout; each is read when it is asked for."""
    description: ModelDescription | None
    """If the file is one of ours."""
    class_names: tuple[str, ...] | None
    """If the file names them."""
    place: str
    """The place in the file: keys, and the prefix that was taken off."""
    averaged: bool


def read_file(path: Path, weights: Literal["raw", "ema"] | None = None) -> Found:
    """The state dict of a TNT in a checkpoint file of any kind.

    Args:
        weights: which to take of a training checkpoint that has both; by default the averaged ones where there are any.

    Raises:
        InputError: the file is missing, damaged or no checkpoint, or there is no TNT in it.
    """
    checkpoint = read_checkpoint(path)
    found = find_state_dict(str(path), checkpoint.content, weights)
    # What is no tensor (a number of epochs) is nothing of the network, unless it stands where a tensor should.
    tensors = dict(found.tensors)
    description = _description(path, checkpoint.metadata, found)
    return Found(tensors, description, _class_names(checkpoint.content), found.place, found.averaged)


def _description(path: Path, metadata: Mapping[str, str], found: StateDict) -> ModelDescription | None:
    kept = found.attributes.get("_metadata")
    text = metadata.get(METADATA_KEY) or (kept.get(METADATA_KEY) if isinstance(kept, Mapping) else None)
    if text is None:
        return None
    try:
        return description_from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the description of the model in {path} is damaged: {error}") from error


def _class_names(content: Any) -> tuple[str, ...] | None:
    """The names of the classes that mmengine (`meta/dataset_meta/classes`) or mmcv (`meta/CLASSES`) put beside weights.

    Invalid names are ignored.
    """
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    dataset = meta.get("dataset_meta")
    names = dataset.get("classes") if isinstance(dataset, Mapping) else meta.get("CLASSES")
    try:
        return named_classes(names)
    except InputError:
        return None


LAYOUTS = tuple(ARCHITECTURES)
# Parameters that every TNT and every PyramidTNT has.
_OUR_MARKERS = ("blocks.0.outer.attn.qkv.kernel", "stages.0.blocks.0.outer.attn.qkv.kernel")
_PYRAMID_MARKER = tensor_names(_OUR_MARKERS[1], "huawei")[0]


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what has a shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if hasattr(tensor, "shape")}


def recognise_layout(shapes: Container[str]) -> str:
    """The layout of a state dict that `find_state_dict` found, from the names of its tensors.

    Raises:
        InputError: it is no TNT and no PyramidTNT.
    """
    if any(path in shapes for path in _OUR_MARKERS):
        return OURS
    if _PYRAMID_MARKER in shapes:
        return "huawei"
    for layout in LAYOUTS:
        if tensor_names(_OUR_MARKERS[0], layout)[0] in shapes:
            return layout
    raise InputError(f"this is the state dict of another network: it has the names of none of {', '.join(LAYOUTS)}")


def _is_pyramid(names: Container[str]) -> bool:
    return _PYRAMID_MARKER in names or _OUR_MARKERS[1] in names


def recognise_config(
    layout: str,
    shapes: Mapping[str, tuple[int, ...]],
    image_size: tuple[int, int] | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The published model whose state dict this is, with its image size, channels and classes, from its shapes.

    Args:
        image_size: what the model is wanted for. A file does not say how many rows and columns its positions have: they
            are taken for a square, or if they cannot be one, for this.
        sizes: the name of the published model, and sizes that differ from it; without any it is recognised.

    Raises:
        InputError: it has none of the published sizes.
    """

    if layout == OURS:
        raise InputError("it has the names of tnt_jax, and not the description that tnt_jax writes with them")

    def shape(path: str, rank: int) -> tuple[int, ...]:
        (name,) = tensor_names(path, layout)
        if len(shapes.get(name, ())) != rank:
            raise InputError(f"{name} has shape {shapes.get(name)}, and in a TNT it has {rank} dimensions")
        return shapes[name]

    pyramid = _is_pyramid(shapes)
    architecture = "pyramid" if pyramid else ARCHITECTURES[layout][0]
    if architecture == "official" and tensor_names("blocks.0.words_to_sentence.norm2.scale", layout)[0] not in shapes:
        architecture = "legacy"
    sentences = shape("sentence_positions", 3)[1]
    known = dict(sizes) if sizes and len(sizes) > 1 else {"name": _published_name(architecture, shape)}
    with contextlib.suppress(InputError):  # timm and mmpretrain have no place for it
        name = f"{'stages.0.' if pyramid else ''}blocks.0.outer.se.norm.scale"
        known |= {"squeeze_excitation": True} if tensor_names(name, layout)[0] in shapes else {}
    if layout == "transformers":
        known["head"] = DETR_HEAD
    part = OF_CLASSES.get(known.get("head"), OfClasses())
    bias = f"{part.path}.bias"
    classes = shape(bias, 1)[0] - part.others if tensor_names(bias, layout)[0] in shapes else 0
    channels = shape("stem.common.conv.kernel" if pyramid else "word_embedding.conv.kernel", 4)[1]
    patch_size = known.get("patch_size", VARIANTS[known["name"]].config.patch_size)
    return model_config(
        **known,
        image_size=_image_size(sentences if pyramid else sentences - 1, patch_size, image_size),
        in_channels=channels,
        num_classes=classes,
    )


def _published_name(architecture: str, shape: Callable[[str, int], tuple[int, ...]]) -> str:
    """The published model of an architecture that has sentences of such a width."""
    outer_dim = shape("sentence_positions" if architecture == "pyramid" else "class_token", 3)[-1]
    widths = {
        variant.config.name: np.atleast_1d(variant.config.outer_dim)[0]
        for variant in VARIANTS.values()
        if variant.config.architecture == architecture
    }
    name = next((name for name, width in widths.items() if width == outer_dim), None)
    if name is None:
        known = ", ".join(f"{width} ({name})" for name, width in widths.items())
        raise InputError(f"sentences of {outer_dim} channels are in no published model; known are {known}")
    return name


def _image_size(patches: int, patch_size: int, wanted: tuple[int, int] | None) -> tuple[int, int]:
    side = math.isqrt(patches)
    if side * side == patches:
        return side * patch_size, side * patch_size
    if wanted and (wanted[0] // patch_size) * (wanted[1] // patch_size) == patches:
        return wanted
    raise InputError(f"{patches} sentence positions are no square: give the image size that they were trained for")


def to_parameters(tensors: dict[str, Any], layout: str, config: ModelConfig) -> dict[str, jax.Array]:
    """All tensors of a state dict as all parameters of a configuration.

    They are taken out of `tensors` one after the other, so that no more than one of them is in memory twice.

    Args:
        tensors: arrays, or tensors of a checkpoint, by the names of the layout. What is no tensor is left alone unless
            it stands where a tensor should.

    Raises:
        InputError: they are of the other family, or a tensor is left over, missing, of the wrong shape, or not finite;
            the message lists every one.
    """
    pyramids = _is_pyramid(tensors), config.architecture == "pyramid"
    family, wanted = ("PyramidTNT" if pyramid else "TNT" for pyramid in pyramids)
    if family != wanted:
        raise InputError(f"these are the weights of a {family}, and {config.name} is a {wanted}")
    check_count(config, tensors)
    shapes = parameter_shapes(config)
    expected = layout_shapes({path: of.shape for path, of in shapes.items()}, layout)
    strangers = [
        name for name, value in tensors.items() if name not in expected and is_array(value) and not is_unused(name)
    ]
    faults = [f"{name} {getattr(tensors[name], 'shape', '')} is not in this model" for name in strangers]
    for name, shape in expected.items():
        if not UNUSED.fullmatch(name) and (fault := _fault(tensors, name, shape)):
            faults.append(fault)
    if faults:
        raise InputError(
            f"this is no {config.name} as {layout} names it; nothing was converted:\n  " + "\n  ".join(faults)
        )

    # Copies: what lies in a file that is mapped into memory would not outlast it.
    return {path: _parameter(tensors, path, layout, of.dtype) for path, of in shapes.items()}


def _parameter(tensors: dict[str, Any], path: str, layout: str, dtype: Any) -> jax.Array:
    """A parameter, made of tensors that are taken out of the state dict, of which no other copy stays in memory."""
    taken = []

    def take(name: str) -> np.ndarray:
        taken.append(tensors.pop(name))
        return taken[-1] if isinstance(taken[-1], np.ndarray) else taken[-1].numpy()

    parameter = jnp.array(from_layout(take, path, layout), dtype).block_until_ready()
    for tensor in taken:
        if isinstance(tensor, Tensor):
            tensor.release_pages()
    return parameter


def is_array(value: Any) -> bool:
    """True for a tensor of a checkpoint, and for an array."""
    return is_tensor(value) or isinstance(value, np.ndarray)


def is_unused(name: str) -> bool:
    """True if a tensor of that name belongs to no forward pass: upstream's leftovers, and counters of averaging."""
    return bool(UNUSED.fullmatch(name) or COUNTERS.fullmatch(name))


def _fault(tensors: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> str | None:
    """The fault of a tensor that should have a shape, if it has one."""
    if name not in tensors:
        return f"{name} {shape} is missing"
    tensor = tensors[name]
    if isinstance(tensor, UnsupportedTensor):
        return f"{name} is {tensor.why}, and should be a plain tensor of {shape}"
    if not is_array(tensor):
        return f"{name} is {kind_of(tensor)}, and should be a tensor of {shape}"
    if tuple(tensor.shape) != shape:
        return f"{name} is {tuple(tensor.shape)}, and should be {shape}"
    if tensor.dtype.name not in FLOATING:
        return f"{name} is {tensor.dtype.name}, and should be of floating point: {', '.join(FLOATING)}"
    try:
        array = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
        with np.errstate(over="ignore"):  # a float64 may be beyond what a parameter holds
            finite = np.isfinite(array.astype(np.float32) if array.dtype == np.float64 else array).all()
    except Damaged as error:
        return f"{name} is damaged: {error}"
    if isinstance(tensor, Tensor):
        tensor.release_pages()
    return None if finite else f"{name} has values that are not finite in float32"
