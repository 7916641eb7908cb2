"""A model as a folder, and back: the parameters (Orbax) beside `model.json`.

`model.json` says what the model is, how to feed it, where it came from, and the checksum of each parameter.
"""

import dataclasses
import functools
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.fields import plain
from tnt_jax.models.heads import count_classes
from tnt_jax.models.variants import Model, abstract_model, check_sizes
from tnt_jax.storage.description import (
    DESCRIPTION,
    ModelDescription,
    describe,
    description_of,
    write_description,
)
from tnt_jax.storage.files import check_space, first_line, may_merge, write_whole
from tnt_jax.storage.run import is_run

PARAMETERS = "parameters"


def model_parameters(model: nnx.Module) -> dict[str, Any]:
    """The parameters of a model by their dotted path, such as `blocks.0.inner.attn.qkv.kernel`."""
    return {".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(nnx.state(model))}


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path, shape and dtype of every parameter that the model of a configuration has. Nothing is computed."""
    _, flat = _structure(config)
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def check_count(config: ModelConfig, tensors: Collection) -> None:
    """Raises InputError, before a model is built, if its blocks are more than all tensors that are to fill it."""
    if (blocks := np.sum(config.depth)) > len(tensors):
        raise InputError(f"a model of {blocks:,} blocks is described, and there are {len(tensors):,} tensors")


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
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    source: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop: float | None = None,
    interpolation: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder that `load_model` reads. The folder appears when it is complete, or not at all.

    What the module has become is what is saved: a head of another width, or parameters that were cast.

    Args:
        class_names: one for each output, or a dictionary from the number to the name; by default those that the model
            was loaded with.
        source: where the parameters came from, in anything that JSON can hold.
        mean, std: of each channel, between 0 and 1. These and the two below: by default as the model was loaded, or as
            its published variant.
        crop: share of the shorter side that evaluation keeps.
        interpolation: how images are resized, bicubic or bilinear.
        overwrite: replaces a model that is there.

    Raises:
        InputError: the folder exists, there are not as many class names as outputs, the preprocessing is not sound, or
            the module has other parameters than its configuration says.
    """
    check_destination(folder, overwrite=overwrite)
    description = description_with(
        model, class_names=class_names, source=source, mean=mean, std=std, crop=crop, interpolation=interpolation
    )
    save_parameters(model_parameters(model), description, folder, overwrite=overwrite)


def description_with(
    model: Model,
    *,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    source: Mapping[str, Any] | None = None,
    **preprocessing: Any,
) -> ModelDescription:
    """The description of a model as it is now, changed where something is given; see `save_model`.

    Raises:
        InputError: as `save_model`.
    """
    known = description_of(model)
    config = config_of_parameters(model.config, model_parameters(model))
    same = config.num_classes == known.config.num_classes
    names = known.class_names if same else None
    given = {name: plain(value) for name, value in preprocessing.items() if value is not None}
    return describe(
        config,
        class_names=names if class_names is None else class_names,
        source=known.source if source is None else source,
        preprocessing=dataclasses.replace(known.preprocessing, **given),
        outputs=known.outputs if same else None,
    )


def config_of_parameters(config: ModelConfig, parameters: Mapping[str, Any]) -> ModelConfig:
    """The configuration with the number of classes and the dtype that the parameters have.

    Raises:
        InputError: the parameters are not those of such a model; the message lists every one that differs.
    """
    shapes = {path: tuple(value.shape) for path, value in parameters.items()}
    classes = count_classes(config, shapes)
    dtypes = {str(value.dtype) for value in parameters.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else config.param_dtype
    dtype = dtype if dtype in ("float32", "bfloat16") else config.param_dtype
    config = dataclasses.replace(config, num_classes=classes, param_dtype=dtype)
    check_sizes(config)
    wanted = parameter_shapes(config)
    faults = [f"{path} {shape} is not in such a model" for path, shape in shapes.items() if path not in wanted]
    for path, of in wanted.items():
        if path not in shapes:
            faults.append(f"{path} {of.shape} is missing")
        elif shapes[path] != of.shape:
            faults.append(f"{path} is {shapes[path]}, and should be {of.shape}")
        elif parameters[path].dtype != of.dtype:
            faults.append(f"{path} is {parameters[path].dtype}, and should be {of.dtype}")
    if faults:
        raise InputError(
            f"the parameters are not those of {config.name} as its configuration describes it, so nothing could load "
            "them again; save them with Flax's own tools, or give the model its published form back:\n  "
            + "\n  ".join(faults)
        )
    return config


def save_parameters(
    parameters: Mapping[str, Any], description: ModelDescription, folder: str | os.PathLike, *, overwrite: bool = False
) -> None:
    """`save_model` for parameters by their dotted path that are in no module."""
    config_of_parameters(description.config, parameters)

    def write(folder: Path) -> None:
        folder.mkdir()
        # Orbax copies NumPy arrays, all of them; of JAX arrays it encodes as many at a time as it is told.
        arrays = {path: jnp.asarray(value) for path, value in parameters.items()}
        write_description(folder, dataclasses.replace(description, checksums=tensor_checksums(arrays)))
        at_a_time = 2 * max(array.nbytes for array in arrays.values())
        try:
            handler = ocp.StandardCheckpointHandler(save_concurrent_gb=at_a_time / 1e9, use_ocdbt=may_merge(folder))
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(folder.absolute() / PARAMETERS, unflatten_dict(arrays, sep="."))
        except (ValueError, RuntimeError) as error:  # as which TensorStore raises what the system says
            raise InputError(f"{folder} cannot be written: {first_line(error)}") from error

    check_destination(folder, overwrite=overwrite)
    check_space(folder, sum(value.nbytes for value in parameters.values()))
    write_whole(folder, write)


def check_destination(
    path: str | os.PathLike, *, overwrite: bool, names: Sequence[str] = (PARAMETERS, DESCRIPTION)
) -> None:
    """Raises InputError if something is there that may not be overwritten.

    Args:
        names: what is written into the folder. Nothing else in it is touched, so nothing else may be there.
    """
    if "://" in os.fspath(path):
        raise InputError(f"{path} is an address, and what is written lies on a disk; a bucket can be mounted as one")
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another destination, or overwrite it (--overwrite, overwrite=True)")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if is_run(path):
        raise InputError(f"{path} holds a training run, and is not overwritten; choose another destination")
    if not (path / DESCRIPTION).is_file():
        raise InputError(f"{path} is a folder without {DESCRIPTION}; it is no model, and is not overwritten")
    if others := sorted(each.name for each in path.iterdir() if each.name not in names):
        listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise InputError(f"{path} also holds {listed}, which would be lost; move them, or choose another destination")


def tensor_checksums(parameters: Mapping[str, Any]) -> dict[str, str]:
    """CRC-32 of the bytes of each parameter, in C order."""
    return {
        path: f"{zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data):08x}" for path, value in parameters.items()
    }


def restore_parameters(folder: str | os.PathLike, description: ModelDescription) -> dict[str, np.ndarray]:
    """The parameters beside a description, by their dotted path, verified against it.

    Raises:
        InputError: they cannot be read, or are not those that were saved.
    """
    path = Path(folder).absolute() / PARAMETERS
    if description.checksums is None or not path.is_dir():
        raise InputError(f"{folder} has no parameters, only the description of a model")
    check_count(description.config, description.checksums)
    shapes = parameter_shapes(description.config)
    if differ := sorted(set(shapes) ^ set(description.checksums)):
        raise InputError(
            f"{folder}/{DESCRIPTION} is damaged: its checksums and its model differ in {', '.join(differ)}"
        )
    target = {name: np.empty(shape.shape, shape.dtype) for name, shape in shapes.items()}
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            nested = checkpointer.restore(path, unflatten_dict(target, sep="."))
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    parameters = flatten_dict(nested, sep=".")
    actual = tensor_checksums(parameters)
    if damaged := [name for name in actual if actual[name] != description.checksums[name]]:
        raise InputError(f"{path} is damaged: the checksum is wrong of {', '.join(damaged)}")
    return parameters
