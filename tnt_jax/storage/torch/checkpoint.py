"""A checkpoint of PyTorch in any published layout to the parameters of a model, every tensor accounted for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tnt_jax.config import ModelConfig
from tnt_jax.data.classes import imagenet_names
from tnt_jax.models.variants import VARIANTS
from tnt_jax.storage.description import ModelDescription, describe
from tnt_jax.storage.download import file_sha256
from tnt_jax.storage.torch.read import (
    is_array,
    is_unused,
    read_file,
    recognise_config,
    recognise_layout,
    shapes_of,
    to_parameters,
)

IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model as parameters and what describes them, and how it was found."""

    parameters: Mapping[str, Any]
    """By dotted path."""
    description: ModelDescription
    layout: str | None = None
    """Of the checkpoint that it was read from, if it was one."""
    tensors: int = 0
    """The number of tensors that were read from it."""
    described: bool = True
    """True if the description came with it. Otherwise it was recognised from names and shapes."""
    notes: tuple[str, ...] = ()
    """The tensors that were left out or changed, for people."""


def open_checkpoint(
    path: Path,
    *,
    weights: Literal["raw", "ema"] | None = None,
    image_size: tuple[int, int] | None = None,
    sizes: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    published: bool = False,
) -> Opened:
    """The model in a checkpoint file of any kind and layout.

    Args:
        weights: the raw or the averaged ones of a checkpoint that has both; by default averaged, as timm does.
        image_size: height and width that the file's positions were made for, where they are no square.
        sizes: the name of the published model and the sizes that differ from it, where they are known.
        source: where the file came from, beside what is found in it.
        published: whether it is known to hold the weights that were published for ImageNet-1k.

    Raises:
        InputError: anything is not as it should be; the message lists all of it.
    """
    found = read_file(path, weights)
    shapes = shapes_of(found.tensors)
    layout = recognise_layout(shapes)
    known = found.description
    config = known.config if known else recognise_config(layout, shapes, image_size, sizes)
    count = sum(map(is_array, found.tensors.values()))
    notes = [f"{name} was left out: no forward pass uses it" for name in sorted(filter(is_unused, found.tensors))]
    parameters = to_parameters(found.tensors, layout, config)
    if found.place != "the file itself":
        notes.append(f"read from {found.place} of the file" + (", which is averaged" if found.averaged else ""))
    origin = {"file": path.name, "sha256": file_sha256(path), "layout": layout, "place": found.place}
    description = known or _described(config, found.class_names, published or is_published(path.name))
    description = dataclasses.replace(description, source=origin | dict(source or {}), checksums=None)
    if description.class_names is None and config.num_classes == IMAGENET_CLASSES:
        notes.append("its classes have no names; if they are those of ImageNet-1k, --class-names imagenet-1k says so")
    return Opened(parameters, description, layout, count, known is not None, tuple(notes))


def _described(config: ModelConfig, names: tuple[str, ...] | None, published: bool) -> ModelDescription:
    if names is not None and len(names) != config.num_classes:
        names = None  # of the data that it was trained on before
    if names is None and published and config.num_classes == IMAGENET_CLASSES:
        names = imagenet_names()
    return describe(config, class_names=names)


def is_published(place: str) -> bool:
    """True for an address, a repository of published weights, or the name of such a file."""
    places = [place for variant in VARIANTS.values() for place in variant.weights]
    return place in places or place in [known.rpartition("/")[2] for known in places if known.startswith("https://")]
