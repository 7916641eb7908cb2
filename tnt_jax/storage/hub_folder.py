"""A folder as a repository of the hub has it: weights, and timm's `config.json` that describes them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tnt_jax.config import InputError
from tnt_jax.data.classes import named_classes
from tnt_jax.fields import plain
from tnt_jax.models.variants import VARIANTS
from tnt_jax.storage.description import ModelDescription, Preprocessing, describe
from tnt_jax.storage.torch.checkpoint import Opened, open_checkpoint

CONFIG = "config.json"
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")


def weights_file(folder: Path) -> Path | None:
    """The file of weights in a folder: called as on the hub, or else the only one that there is."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    found = [path for path in sorted(folder.glob("*")) if path.name.lower().endswith(SUFFIXES) and path.is_file()]
    return found[0] if len(found) == 1 else None


def read_config(folder: Path) -> dict[str, Any] | None:
    """timm's `config.json`, with what older releases put at its top moved to `pretrained_cfg`; None if there is none.

    Raises:
        InputError: it is damaged, or is of another architecture.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} is damaged: it is no JSON object")
    if "architecture" not in fields:
        kind = fields.get("model_type") or ", ".join(map(str, fields.get("architectures") or [])) or "unknown"
        raise InputError(f"{folder} holds a model of another architecture: {kind}; this package has TNT and PyramidTNT")
    if "pretrained_cfg" not in fields:
        fields = {**fields, "pretrained_cfg": fields}
    name = fields["architecture"]
    if not isinstance(name, str) or name not in VARIANTS:
        raise InputError(
            f"{folder} holds a model of another architecture: {name}; this package has {', '.join(VARIANTS)}"
        )
    if not isinstance(fields["pretrained_cfg"], dict):
        raise InputError(f"{path} is damaged: pretrained_cfg is no JSON object")
    return fields


def open_hub_folder(
    folder: Path,
    *,
    weights: Literal["raw", "ema"] | None = None,
    source: Mapping[str, Any] | None = None,
    published: bool = False,
) -> Opened:
    """The model in a folder as the hub has it.

    Raises:
        InputError: there are no weights, they are of another architecture than `config.json` says, or one of both
            is damaged.
    """
    fields, path = read_config(folder), weights_file(folder)
    if path is None:
        raise InputError(f"{folder} has no weights: none of {', '.join(NAMES)}, and not exactly one other checkpoint")
    size = _input_size(fields)
    opened = open_checkpoint(path, weights=weights, image_size=size, source=source, published=published)
    if fields is None:
        return opened
    said, config = VARIANTS[fields["architecture"]].config, opened.description.config
    if said.architecture != config.architecture or (said.name != config.name and not opened.described):
        raise InputError(f"{path} holds {config.name}, and {folder / CONFIG} says {said.name}")
    return dataclasses.replace(opened, description=_described(opened.description, fields, folder))


def _input_size(fields: Mapping[str, Any] | None) -> tuple[int, int] | None:
    size = plain((fields or {}).get("pretrained_cfg", {}).get("input_size"))
    return size[1:] if isinstance(size, tuple) and len(size) == 3 and all(type(side) is int for side in size) else None


def _described(known: ModelDescription, fields: Mapping[str, Any], folder: Path) -> ModelDescription:
    """The description with what `config.json` says of inputs and classes, as timm reads it."""
    feeding = fields["pretrained_cfg"]
    if feeding.get("crop_mode", "center") != "center":
        raise InputError(
            f"{folder / CONFIG}: crop_mode is {feeding['crop_mode']}, and this package cuts out the centre"
        )
    preprocessing = Preprocessing(
        image_size=known.config.image_size,
        crop=plain(feeding.get("crop_pct", known.preprocessing.crop)),
        mean=plain(feeding.get("mean", known.preprocessing.mean)),
        std=plain(feeding.get("std", known.preprocessing.std)),
        interpolation=feeding.get("interpolation", known.preprocessing.interpolation),
    )
    try:
        names = named_classes(fields.get("label_names") or feeding.get("label_names") or feeding.get("labels"))
        names = names if names and len(names) == known.config.num_classes else known.class_names
        described = describe(
            known.config, class_names=names, source=known.source, preprocessing=preprocessing, outputs=known.outputs
        )
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    return described
