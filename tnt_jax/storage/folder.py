"""A model as a folder, and back: the parameters (Orbax) beside `model.json`.

`model.json` says what the model is, how to feed it, where it came from, and the checksum of each parameter.
"""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.variants import Model, abstract_model, check_sizes
from tnt_jax.storage.files import write_whole

FORMAT = 1
DESCRIPTION = "model.json"
PARAMETERS = "parameters"
PUBLISHED_CROP = 0.9


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: shorter side to floor(size / crop), centre crop, (x / 255 - mean) / std."""

    image_size: tuple[int, int]
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """Everything of a model but its numbers. A loaded model carries its own as `model.description`."""

    config: ModelConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    source: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)
    """Where the numbers came from, for people to read: a file and its checksum, or a run."""
    checksums: Mapping[str, str] | None = dataclasses.field(default=None, compare=False)
    """CRC-32 of the bytes of each parameter by its path. None where no parameters lie beside the description."""


def describe(
    config: ModelConfig,
    *,
    class_names: Sequence[str] | None = None,
    source: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> ModelDescription:
    """The description of a model, which is fed as its published variant is unless told otherwise.

    Raises:
        InputError: there are not as many class names as classes, or the configuration contradicts itself.
    """
    check_sizes(config)
    if class_names is not None and len(class_names) != config.num_classes:
        raise InputError(f"there are {len(class_names)} class names for a model with {config.num_classes} classes")
    if preprocessing is None:
        half = (0.5,) * config.in_channels
        preprocessing = Preprocessing(config.image_size, PUBLISHED_CROP, half, half)
    return ModelDescription(config, preprocessing, class_names and tuple(class_names), source)


def description_of(model: Model) -> ModelDescription:
    """The description that a loaded model carries, or that of a published model for one that was made here."""
    return getattr(model, "description", None) or describe(model.config)


def model_parameters(model: nnx.Module) -> dict[str, Any]:
    """The parameters of a model by their dotted path, such as `blocks.0.inner.attn.qkv.kernel`."""
    return {".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(nnx.state(model))}


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path, shape and dtype of every parameter that the model of a configuration has. Nothing is computed."""
    _, flat = _structure(config)
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def model_from_parameters(config: ModelConfig, parameters: Mapping[str, Any]) -> Model:
    """The module of a configuration around parameters that are named and shaped as `parameter_shapes` says."""
    graph, flat = _structure(config)
    filled = [
        (path, variable.replace(jnp.asarray(parameters[".".join(map(str, path))], variable.dtype)))
        for path, variable in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


@functools.lru_cache(maxsize=4)
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, list]:
    graph, state = nnx.split(abstract_model(config))
    return graph, list(nnx.to_flat_state(state))


def save_model(
    model: Model,
    folder: str | os.PathLike,
    *,
    class_names: Sequence[str] | None = None,
    source: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder that `load_model` reads. The folder appears when it is complete, or not at all.

    Args:
        class_names: one for each output; by default those that the model was loaded with.
        source: where the parameters came from, in anything that JSON can hold.
        overwrite: replaces a model that is there.

    Raises:
        InputError: the folder exists, or there are not as many class names as outputs.
    """
    known = description_of(model)
    description = describe(
        model.config,
        class_names=known.class_names if class_names is None else class_names,
        source=known.source if source is None else source,
        preprocessing=known.preprocessing,
    )
    save_parameters(model_parameters(model), description, folder, overwrite=overwrite)


def save_parameters(
    parameters: Mapping[str, Any], description: ModelDescription, folder: str | os.PathLike, *, overwrite: bool = False
) -> None:
    """`save_model` for parameters by their dotted path that are in no module."""

    def write(folder: Path) -> None:
        folder.mkdir()
        # Orbax copies NumPy arrays, all of them; of JAX arrays it encodes as many at a time as it is told.
        arrays = {path: jnp.asarray(value) for path, value in parameters.items()}
        write_description(folder, dataclasses.replace(description, checksums=tensor_checksums(arrays)))
        at_a_time = 2 * max(array.nbytes for array in arrays.values())
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(save_concurrent_gb=at_a_time / 1e9)) as checkpointer:
            checkpointer.save(folder.absolute() / PARAMETERS, unflatten_dict(arrays, sep="."))

    check_destination(folder, overwrite=overwrite)
    write_whole(folder, write)


def check_destination(path: str | os.PathLike, *, overwrite: bool) -> None:
    """Raises InputError if something is there that may not be overwritten, or that is not a model of ours."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another destination, or overwrite it (--overwrite, overwrite=True)")
    if path.is_dir() and any(path.iterdir()) and not (path / DESCRIPTION).is_file():
        raise InputError(f"{path} is a folder without {DESCRIPTION}; it is no model, and is not overwritten")


def tensor_checksums(parameters: Mapping[str, Any]) -> dict[str, str]:
    """CRC-32 of the bytes of each parameter, in C order."""
    return {
        path: f"{zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data):08x}" for path, value in parameters.items()
    }


def write_description(folder: str | os.PathLike, description: ModelDescription) -> None:
    """Writes `model.json` into a folder that exists."""
    fields = dataclasses.asdict(description)
    text = json.dumps({"format": FORMAT, **fields}, indent=1, ensure_ascii=False, default=str)
    (Path(folder) / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def read_description(folder: str | os.PathLike) -> ModelDescription:
    """Reads `model.json`: of a saved model, or of a training run.

    Raises:
        InputError: there is none, it was written by a later version, or it is damaged.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{folder} is not a model: it has no {DESCRIPTION}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("format")
        if version == FORMAT:
            return description_from_dict(fields)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    raise InputError(f"{path} has format {version}, and this version of tnt_jax reads format {FORMAT}")


def description_from_dict(fields: dict[str, Any]) -> ModelDescription:
    """A description from what `dataclasses.asdict` made of it, after a journey through JSON, which has no tuples."""
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in fields["config"].items()}
    feeding = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields["preprocessing"].items()
    }
    described = describe(
        ModelConfig(**config),
        class_names=fields["class_names"],
        source=fields["source"],
        preprocessing=Preprocessing(**feeding),
    )
    return dataclasses.replace(described, checksums=fields["checksums"])


def load_folder(folder: str | os.PathLike) -> Model:
    """The model in a folder that `save_model` wrote, every parameter verified by name, shape and checksum.

    Raises:
        InputError: it is not such a folder, or it is damaged; the message lists all parameters that are.
    """
    description = read_description(folder)
    model = model_from_parameters(description.config, restore_parameters(folder, description))
    model.description = description
    return model


def restore_parameters(folder: str | os.PathLike, description: ModelDescription) -> dict[str, np.ndarray]:
    """The parameters beside a description, by their dotted path, verified against it.

    Raises:
        InputError: they cannot be read, or are not those that were saved.
    """
    path = Path(folder).absolute() / PARAMETERS
    shapes = parameter_shapes(description.config)
    if description.checksums is None or not path.is_dir():
        raise InputError(f"{folder} has no parameters, only the description of a model")
    if differ := sorted(set(shapes) ^ set(description.checksums)):
        raise InputError(
            f"{folder}/{DESCRIPTION} is damaged: its checksums and its model differ in {', '.join(differ)}"
        )
    target = {name: np.empty(shape.shape, shape.dtype) for name, shape in shapes.items()}
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            nested = checkpointer.restore(path, unflatten_dict(target, sep="."))
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    parameters = flatten_dict(nested, sep=".")
    actual = tensor_checksums(parameters)
    if damaged := [name for name in actual if actual[name] != description.checksums[name]]:
        raise InputError(f"{path} is damaged: the checksum is wrong of {', '.join(damaged)}")
    return parameters
