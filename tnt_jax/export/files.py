"""A model for those who do not have this code: StableHLO, and ONNX.

Both take pixels as evaluation cuts them, any number of images, and give logits, or the values of a regression in the
units of its targets: normalising is inside. Pixels are uint8, or float32 where the model was trained on others. Beside
`FILE` lies `FILE.json`: how an image is cut, the task, the names of the classes, labels or targets, with which versions
the file was made, and how long JAX promises to read it.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Num

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.export.formats import EIGHT_BITS, FORMATS, OPSET, OPSETS, Samples, logits_of, of_equations, output_name
from tnt_jax.export.quantize import Judged, quantize
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import description_of
from tnt_jax.storage.files import write_whole
from tnt_jax.storage.folder import model_parameters
from tnt_jax.tasks.table import TASKS

TOLERANCE = 1e-4  # of logits, beside their size where that is above 1
MONTHS = 6
"""Later releases of JAX promise so long to read an export, https://docs.jax.dev/en/latest/export/export.html."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """The paths that were written."""

    path: str
    size: int
    """Bytes."""
    difference: float
    """The greatest difference of a logit between the file, as its own runtime computes it, and the model."""
    limits: tuple[str, ...]
    """The parts of a model that the format does not hold."""
    quantization: dict[str, Any] | None = None
    """The price of int8, where it was asked for: `Quantized.report`."""


def export_model(
    model: Model,
    path: str | os.PathLike,
    format: Literal["stablehlo", "onnx"],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    opset: int = OPSET,
    images: Num[np.ndarray, "batch height width channels"] | None = None,
    int8: Judged | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a model as one file and its description beside it, after the file has given the model's logits.

    Args:
        dtype: what the file computes in, whatever the model was trained in.
        opset: of ONNX.
        images: as evaluation reads and cuts them; the logits of these are compared, beside those of noise. The file
            takes pixels of their type; without images uint8, or what `DataConfig.white` says.
        int8: for ONNX, quantise with these images; what is compared is then the float32 form, and top-1 of both is
            measured.

    Raises:
        InputError: the destination exists or has another ending, the format cannot hold the model, the converter is
            not installed, the logits differ by more than 1e-4, or int8 loses more than its tolerance. Nothing is
            written then.
    """
    path, kind = Path(path), FORMATS[format]
    _check_request(model, path, format, dtype, opset, int8, overwrite)
    samples = Samples.of(model, images)
    plain = of_equations(model, dtype)
    compute = logits_of(plain, samples=samples)
    options = {"opset": opset} if format == "onnx" else {}
    content, run = kind.write(plain, compute, samples=samples, **options)
    difference = check_difference(model, plain, run, images, format)
    about = describe_file(plain, compute, format, samples) | options
    if int8 is not None:
        int8 = dataclasses.replace(
            int8, calibration=samples.of_read(int8.calibration), images=samples.of_read(int8.images)
        )
        parameters = {name: np.asarray(value) for name, value in model_parameters(plain).items()}
        quantized = quantize(content, int8, parameters)
        content, about["quantization"] = quantized.content, quantized.report
    write_whole(path, lambda unfinished: unfinished.write_bytes(content))
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    write_whole(description_path(path), lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    limits = kind.limits if int8 is None else (*kind.limits[:-1], INT8_LIMIT)
    return Exported(str(path), len(content), difference, limits, about.get("quantization"))


def _check_request(
    model: Model, path: Path, format: str, dtype: str, opset: int, int8: Judged | None, overwrite: bool
) -> None:
    """Raises InputError, before anything is computed, where no such file can be written."""
    kind = FORMATS[format]
    if path.suffix != kind.suffix:
        raise InputError(f"{path} should end in {kind.suffix}")
    if dtype not in kind.dtypes:
        raise InputError(f"--dtype is {dtype}, and a file of {format} computes in {' or '.join(kind.dtypes)}")
    if opset not in OPSETS or (opset != OPSET and format != "onnx"):
        raise InputError(f"--opset is {opset}, and must lie between {OPSETS[0]} and {OPSETS[-1]}, for --format onnx")
    for each in (path, description_path(path)):
        if each.exists() and not overwrite:
            raise InputError(f"{each} exists; choose another file, or overwrite it (--overwrite, overwrite=True)")
    if int8 is not None and format != "onnx":
        raise InputError(f"int8 is for --format onnx, and the format is {format}")
    if int8 is not None and not TASKS[task := description_of(model).outputs.task].one_class:
        raise InputError(f"int8 is judged by top-1, and the task of the model is {task}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")


INT8_LIMIT = "it is fast on processors with 8-bit products (AVX512-VNNI, AVX-VNNI, ARM dotprod)"


def description_path(path: str | os.PathLike) -> Path:
    """The path of an exported file's description."""
    path = Path(path)
    return path.with_name(f"{path.name}.json")


def check_difference(model: Model, plain: Model, run: Callable, images: np.ndarray | None, format: str) -> float:
    """The difference of a file's logits from the model's, of noise and of images. Raises InputError if it is too far.

    Where the file computes in what the model computes in, in float32, it is compared with the model as it runs, kernels
    included; else with the equations in the file's dtype, since rounding alone differs by more than the tolerance.
    """
    samples = Samples.of(model, images)
    pixels = samples.noise((3, *model.config.image_size, model.config.in_channels))
    pixels = pixels if images is None else np.concatenate([pixels, samples.of_read(images)])
    as_it_runs = plain.config.dtype == model.config.dtype == "float32"
    expected = jax.jit(logits_of(model if as_it_runs else plain, samples=samples))(pixels)
    expected = np.asarray(expected, np.float64)
    difference = float(np.max(np.abs(run(pixels) - expected)) / max(1.0, np.abs(expected).max()))
    if not difference <= TOLERANCE:
        raise InputError(
            f"the logits of the {format} file differ from the model's by {difference:.2g}: nothing is written"
        )
    return difference


def describe_file(model: Model, compute: Callable, format: str, samples: Samples = EIGHT_BITS) -> dict[str, Any]:
    """The content of `FILE.json`."""
    known = description_of(model)
    channels, (height, width) = known.config.in_channels, known.preprocessing.image_size
    one = jax.ShapeDtypeStruct((1, height, width, channels), samples.dtype)
    output = jax.eval_shape(compute, one).shape[1:]
    cut = {
        "resize_to_cover": [math.floor(side / known.preprocessing.crop) for side in (height, width)],
        "interpolation": known.preprocessing.interpolation,
        "cut_at_centre": [height, width],
    }
    if TASKS[known.outputs.task].dense:
        fitted = {"fit_whole_into": [height, width], "fill_around_it": known.preprocessing.mean}
        cut = fitted | {"interpolation": known.preprocessing.interpolation}
    return {
        "model": known.config.name,
        "format": format,
        "made": _made(format),
        "input": {
            "name": "pixels",
            "dtype": samples.dtype,
            "white": 255 if samples.white is None else samples.white,
            "shape": ["batch", height, width, channels],
            "mode": {1: "L", 3: "RGB"}.get(channels),
            **cut,
        },
        "output": {"name": output_name(model), "dtype": "float32", "shape": ["batch", *output]},
        "task": known.outputs.task,
        "thresholds": known.outputs.thresholds,
        "class_names": known.class_names,
    }


def _made(format: str) -> dict[str, Any]:
    """When and with what a file was made, and how long it can be read."""
    today = datetime.date.today()
    made: dict[str, Any] = {
        "date": today.isoformat(),
        "versions": {"tnt_jax": tnt_jax.__version__}
        | {name: importlib.metadata.version(name) for name in FORMATS[format].packages},
    }
    if format == "stablehlo":
        month = today.month - 1 + MONTHS
        until = today.replace(year=today.year + month // 12, month=month % 12 + 1, day=min(today.day, 28))
        made["read_until"] = until.isoformat()
        made["then"] = (
            f"JAX promises that its releases of {MONTHS} months read the file. Afterwards, if a newer one does not: "
            f"export the model again, or pip install jax=={jax.__version__}"
        )
    return made


def load_export(path: str | os.PathLike) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """A StableHLO file as a function from pixels to logits, and its description.

    Raises:
        InputError: the file or its description cannot be read. If the promise of JAX has run out, the message says
            when it was made, and what to do.
    """
    try:
        content = Path(path).read_bytes()
        about = json.loads(description_path(path).read_text(encoding="utf-8"))
        made = about["made"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as an export with its description beside it: {error}") from error
    try:
        exported = jax.export.deserialize(bytearray(content))
        jax.jit(exported.call).lower(jax.ShapeDtypeStruct((1, *about["input"]["shape"][1:]), about["input"]["dtype"]))
    except Exception as error:  # whatever an unknown version of the format leads to
        raise InputError(f"{path} cannot be read: {_reason(made)} ({error})") from error
    return lambda pixels: np.asarray(exported.call(pixels)), about


def _reason(made: dict[str, Any]) -> str:
    """The reason why a StableHLO file cannot be read: it is too new or too old for this JAX, or damaged."""
    version, until = made["versions"]["jax"], made["read_until"]
    its, ours = ([int(part) for part in re.findall(r"\d+", each)[:3]] for each in (version, jax.__version__))
    if its > ours:
        return f"jax {version} made it, and this is jax {jax.__version__}; pip install 'jax>={version}'"
    if datetime.date.fromisoformat(until) >= datetime.date.today():
        return "it is damaged, export the model again"
    return (
        f"jax {version}, which made it on {made['date']}, promised that it can be read until {until}, and this is jax "
        f"{jax.__version__}; export the model again, or pip install jax=={version}"
    )
