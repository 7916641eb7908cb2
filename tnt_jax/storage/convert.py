"""A MODEL, wherever it lies, as a model folder: with another head, image size, or names of classes."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tnt_jax.fields import plain
from tnt_jax.models.adapting import adapt
from tnt_jax.models.variants import with_changes
from tnt_jax.storage.description import ModelDescription, describe
from tnt_jax.storage.folder import check_destination, save_parameters
from tnt_jax.storage.load import open_model


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The layout that was recognised, and the changes on the way."""

    layout: str | None
    """Of a checkpoint; None of a model folder or a run."""
    description: ModelDescription
    """Of the model that was written."""
    tensors: int
    """The number of tensors that were read."""
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    weights: Literal["raw", "ema"] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop: float | None = None,
    interpolation: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes a model as a folder that `load_model` reads; every tensor is accounted for, or nothing is written.

    Args:
        source: anything that `load_model` takes.
        image_size: height and width; sentence positions are resized to it.
        in_channels: of the images; the first filters are adapted to it.
        num_classes: of a fresh head, unless the model's has as many; 0 for none.
        weights: the raw or the averaged ones of what has both; by default averaged, as timm does.
        class_names: one for each class, or a dictionary from the number to the name.
        mean, std, crop, interpolation: how images become inputs, as in `save_model`.
        overwrite: replaces a model that is there.

    Raises:
        InputError: anything is not as it should be; the message lists all of it.
    """
    check_destination(destination, overwrite=overwrite)
    opened = open_model(source, weights=weights, image_size=image_size)
    known = opened.description
    changes = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    wanted = with_changes(known.config, {name: value for name, value in changes.items() if value is not None})
    parameters, adapted = adapt(opened.parameters, known.config, wanted)
    if class_names is None and wanted.num_classes == known.config.num_classes:
        class_names = known.class_names
    feeding: dict[str, Any] = {"mean": mean, "std": std, "crop": crop, "interpolation": interpolation}
    given = {name: plain(value) for name, value in feeding.items() if value is not None}
    preprocessing = dataclasses.replace(known.preprocessing.adapted(wanted), **given)
    outputs = known.outputs if wanted.num_classes == known.config.num_classes else None
    description = describe(
        wanted, class_names=class_names, source=known.source, preprocessing=preprocessing, outputs=outputs
    )
    save_parameters(parameters, description, destination, overwrite=overwrite)
    notes = [note for note in opened.notes if class_names is None or "--class-names" not in note]
    return Conversion(opened.layout, description, opened.tensors, (*notes, *adapted))
