"""A model's metadata, as `model.json` holds it: sizes, preprocessing, class names; everything but the parameters.

And a configuration as JSON, which `config.json` of a run holds.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnt_jax.config import InputError, ModelConfig, TrainConfig
from tnt_jax.data.classes import named_classes
from tnt_jax.fields import plain
from tnt_jax.models.variants import check_sizes
from tnt_jax.storage.files import first_line
from tnt_jax.storage.places import place
from tnt_jax.tasks.table import check_outputs
from tnt_jax.tasks.task import Outputs

FORMAT = 1
DESCRIPTION = "model.json"
PUBLISHED_CROP = 0.9  # of every published model, whose mean and std are 0.5
INTERPOLATIONS = ("bicubic", "bilinear")
NOT_THE_RUN = ("wandb", "profile", "distributed")
"""Fields of how a run is started and watched, which are no part of what it computes."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image: shorter side to floor(size / crop), centre crop, (x / white - mean) / std."""

    image_size: tuple[int, int]
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    white: float | None = None
    """As `DataConfig.white`."""

    def adapted(self, config: ModelConfig) -> "Preprocessing":
        """For the image size and the channels of a model that was adapted.

        Means and standard deviations are averaged for one channel, and for more repeated in their order.
        """
        changes = {"image_size": config.image_size}
        for name in ("mean", "std"):
            values, channels = getattr(self, name), config.in_channels
            if channels == 1 != len(values):
                changes[name] = (sum(values) / len(values),)
            elif channels != len(values):
                changes[name] = tuple(values[channel % len(values)] for channel in range(channels))
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The metadata of a model. A loaded model carries its own as `model.description`."""

    config: ModelConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    """Of the classes or labels; of a regression the names of its targets."""
    outputs: Outputs = dataclasses.field(default_factory=Outputs)
    source: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)
    """The origin of the numbers, for people to read: a file and its checksum, or a run."""
    checksums: Mapping[str, str] | None = dataclasses.field(default=None, compare=False)
    """CRC-32 of the bytes of each parameter by its path. None where no parameters lie beside the description."""


def describe(
    config: ModelConfig,
    *,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    source: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
    outputs: Outputs | None = None,
) -> ModelDescription:
    """The description of a model, which is fed as its published variant is unless told otherwise.

    Raises:
        InputError: the names are not one text for each class, the configuration contradicts itself, or the
            preprocessing is none.
    """
    config = _plain_fields(config)
    check_sizes(config)
    names = named_classes(class_names)
    if names is not None and len(names) != config.num_classes:
        raise InputError(f"there are {len(names)} class names for a model with {config.num_classes} classes")
    if preprocessing is None:
        half = (0.5,) * config.in_channels
        preprocessing = Preprocessing(config.image_size, PUBLISHED_CROP, half, half)
    preprocessing = _plain_fields(preprocessing)
    check_preprocessing(preprocessing, config)
    outputs = _plain_fields(outputs or Outputs())
    check_outputs(outputs, config.num_classes)
    return ModelDescription(config, preprocessing, names, outputs, source)


def check_preprocessing(preprocessing: Preprocessing, config: ModelConfig) -> None:
    """Raises InputError unless an image can be prepared so for a resolved configuration."""
    if preprocessing.image_size != config.image_size:
        raise InputError(f"preprocessing.image_size {preprocessing.image_size} is not the model's, {config.image_size}")
    for name in ("mean", "std"):
        values = getattr(preprocessing, name)
        if not isinstance(values, tuple) or len(values) != config.in_channels:
            raise InputError(f"{name} is {values}, and should be one number for each of {config.in_channels} channels")
        low = "at least 0" if name == "mean" else "above 0"
        for value in values:
            if preprocessing.white and _is_number(value) and (name == "mean" or value > 0):
                continue  # samples of any range
            if not _is_number(value) or not 0 <= value <= 1 or (name == "std" and value == 0):
                hint = "; pixels lie between 0 and 1, so divide it by 255" if _is_number(value) and value > 1 else ""
                raise InputError(f"{name} is {values}, and each should be {low} and at most 1{hint}")
    if preprocessing.white is not None and (not _is_number(preprocessing.white) or preprocessing.white <= 0):
        raise InputError(f"white is {preprocessing.white!r}, and should be a number above 0, or null")
    if not _is_number(preprocessing.crop) or not 0 < preprocessing.crop <= 1:
        raise InputError(f"crop is {preprocessing.crop}, and should be a share of the image above 0 and at most 1")
    if preprocessing.interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation is {preprocessing.interpolation!r}; known are {', '.join(INTERPOLATIONS)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain_fields(record: Any) -> Any:
    """A dataclass with Python's numbers and tuples for NumPy's and for lists, so that JSON gives back what it got."""
    changes = {field.name: plain(getattr(record, field.name)) for field in dataclasses.fields(record)}
    return dataclasses.replace(record, **changes)


def description_of(model: Any) -> ModelDescription:
    """The description that a loaded model carries, or that of a published model for one that was made here.

    A head of another width that the model was given since has no names.
    """
    known = getattr(model, "description", None) or describe(model.config)
    kernel = getattr(getattr(model, "head", None), "kernel", None)
    if kernel is None or kernel.shape[-1] == known.config.num_classes:
        return known
    return dataclasses.replace(
        known,
        config=dataclasses.replace(known.config, num_classes=int(kernel.shape[-1])),
        class_names=None,
        outputs=Outputs(),
    )


def description_text(description: ModelDescription) -> str:
    """The description as JSON, which `description_from_dict` takes back to the same.

    Raises:
        InputError: its `source` has something that JSON cannot hold.
    """
    try:
        known = description.source or {}
        own = {name: without_places(known[name]) for name in ("run", "data") if name in known}
        source = None if description.source is None else _finite({**known, **own})
        fields = {"format": FORMAT, **dataclasses.asdict(description), "source": source}
        text = json.dumps(fields, indent=1, ensure_ascii=False, default=_for_json, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the description of the model cannot be written as JSON: {error}") from error
    back = description_from_dict(json.loads(text))
    if back != description:
        raise InputError(f"the description of the model would come back from {DESCRIPTION} as another: {back}")
    return text + "\n"


def without_places(value: Any) -> Any:
    """A value without where on somebody's disk something lay: of an absolute path, its name is left."""
    if isinstance(value, Mapping):
        return {name: without_places(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each) for each in value]
    if not isinstance(value, str | Path):
        return value
    kind, colon, place = str(value).rpartition(":")  # as sources of data have it: csv:/home/me/birds.csv
    return f"{kind}{colon}{Path(place).name}" if place.startswith(("/", "~")) and "://" not in str(value) else value


def _finite(value: Any) -> Any:
    """A value with None for each number that JSON does not have: a score may be NaN."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float | np.floating) and not math.isfinite(value) else value


def _for_json(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r} is nothing that JSON can hold")


def write_description(folder: str | Path, description: ModelDescription) -> None:
    """Writes `model.json` into a folder that exists.

    Raises:
        InputError: as `description_text`.
    """
    (place(folder) / DESCRIPTION).write_text(description_text(description), encoding="utf-8")


def read_description(folder: str | Path) -> ModelDescription:
    """Reads `model.json`: of a saved model, or of a training run.

    Raises:
        InputError: there is none, it was written by a later version, or it is damaged.
    """
    path = place(folder) / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{folder} is not a model: it has no {DESCRIPTION}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.get("format")
        if version == FORMAT:
            return description_from_dict(fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {first_line(error)[:200]}") from error
    raise InputError(f"{path} has format {version}, and this version of tnt_jax reads format {FORMAT}")


def description_from_dict(fields: Mapping[str, Any]) -> ModelDescription:
    """A description from what `dataclasses.asdict` made of it, after a journey through JSON, which has no tuples.

    Raises:
        InputError: it is not sound.
    """
    described = describe(
        from_json(fields["config"], ModelConfig),
        class_names=fields["class_names"],
        source=fields["source"],
        preprocessing=from_json(fields["preprocessing"], Preprocessing),
        outputs=from_json(fields.get("outputs", {}), Outputs),
    )
    return dataclasses.replace(described, checksums=fields["checksums"])


def to_json(config: TrainConfig) -> dict:
    """A configuration as JSON holds it: nested dictionaries, tuples as lists, without how it is started and watched."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in fields.items() if name not in NOT_THE_RUN}


def from_json(values: dict, kind: type = TrainConfig[ModelConfig]):
    """The configuration that `to_json` gave, of a complete run or with `TrainConfig[ModelChanges]` of a config file.

    Raises:
        InputError: a field that this version does not have, or one that it misses.
    """
    plain_kind = typing.get_origin(kind) or kind
    if not isinstance(values, dict):
        raise InputError(f"{values!r} was found where the fields of a {plain_kind.__name__} should be")
    hints = typing.get_type_hints(plain_kind)
    if kind is not plain_kind:
        (hints["model"],) = typing.get_args(kind)
    fields = dataclasses.fields(plain_kind)
    required = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    for names, fault in ((values.keys() - hints.keys(), "has no field"), (required - values.keys(), "needs the field")):
        if names:
            listed = ", ".join(sorted(names))
            raise InputError(f"{plain_kind.__name__} {fault} {listed}; this was written by another version")

    def read(value, field_type):
        if dataclasses.is_dataclass(field_type):
            return from_json(value, field_type)
        return tuple(value) if isinstance(value, list) else value

    return plain_kind(**{name: read(value, hints[name]) for name, value in values.items()})
