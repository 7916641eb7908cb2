"""A model for those who do not have this code: StableHLO, and ONNX.

Both take uint8 pixels as evaluation cuts them, any number of images, and give logits, or the values of a regression in
the units of its targets: normalising is inside. Beside the file lies a `.json` with the size that images are cut to,
how to cut them, the task, and the names of the classes, labels or targets.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from tnt_jax.config import InputError
from tnt_jax.data.mixing import normalise
from tnt_jax.models.variants import Model, with_formulation
from tnt_jax.storage.description import description_of
from tnt_jax.storage.files import write_whole

SUFFIXES = {"stablehlo": ".stablehlo", "onnx": ".onnx"}
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of logits, beside their size where that is above 1
LARGEST_ONNX = 2**31 - 1  # bytes: what a protobuf message can hold
INSTALL_ONNX = (
    "pip install onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 && pip install --no-deps jax2onnx==0.17.1 "
    "(--no-deps, because jax2onnx declares an older Orbax than ours and does not use it)"
)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written."""

    path: str
    size: int
    """Bytes."""
    difference: float
    """The greatest difference of a logit between the file, as its own runtime computes it, and the model."""
    limits: tuple[str, ...]
    """What the format does not hold."""


def export_model(
    model: Model, path: str | os.PathLike, format: Literal["stablehlo", "onnx"], *, overwrite: bool = False
) -> Exported:
    """Writes a model as one file and its description beside it, after the file has given the model's logits.

    Raises:
        InputError: the destination exists or has another ending, the format cannot hold the model, the converter is
            not installed, or the logits differ by more than 1e-4. Nothing is written then.
    """
    path, suffix = Path(path), SUFFIXES[format]
    if path.suffix != suffix:
        raise InputError(f"{path} should end in {suffix}")
    description = path.with_suffix(".json")
    for each in (path, description):
        if each.exists() and not overwrite:
            raise InputError(f"{each} exists; choose another file, or overwrite it (--overwrite, overwrite=True)")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    compute = logits_of(_of_equations(model))
    content, run = {"stablehlo": to_stablehlo, "onnx": to_onnx}[format](model, compute)
    difference = _difference(model, run)
    if not difference <= TOLERANCE:
        raise InputError(
            f"the logits of the {format} file differ from the model's by {difference:.2g}: nothing is written"
        )
    write_whole(path, lambda unfinished: unfinished.write_bytes(content))
    text = json.dumps(_describe(model, compute, format), indent=2, ensure_ascii=False) + "\n"
    write_whole(description, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    return Exported(str(path), len(content), difference, LIMITS[format])


LIMITS = {
    "stablehlo": (
        "it evaluates and cannot be trained: there is no gradient in it",
        "images have one size; the number of images is free",
        "it runs where JAX or another runtime of StableHLO is, on " + ", ".join(PLATFORMS),
    ),
    "onnx": (
        "it evaluates and cannot be trained",
        "images have one size; the number of images is free",
        "it is float32: ONNX Runtime has no bfloat16 on a CPU",
    ),
}


def logits_of(model: Model) -> Callable[[Array], Array]:
    """What is exported: the function from uint8 pixels (batch, height, width, channels) to logits (batch, classes).

    Of a regression, to values in the units of the targets. Of a model with `num_classes=0`, to its features. Products
    of float32 matrices are exact to float32 on every platform, so that a file is compared with what a CPU computes.
    """
    graphdef, state = nnx.split(model)
    preprocessing, outputs = description_of(model).preprocessing, description_of(model).outputs
    scale, offset = (
        None if each is None else np.array(each, np.float32) for each in (outputs.target_std, outputs.target_mean)
    )

    def logits(pixels: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        with jax.default_matmul_precision("highest"):
            found = nnx.merge(graphdef, state)(normalise(pixels, preprocessing))
            return found if scale is None else found.astype(jnp.float32) * scale + offset

    return logits


def output_name(model: Model) -> str:
    """What the output of a file is called."""
    return "values" if description_of(model).outputs.task == "regression" else "logits"


def _of_equations(model: Model) -> Model:
    """The same model without kernels, which nobody has who does not have this code."""
    plain = with_formulation(model, "reference")
    plain.description = description_of(model)
    return plain


def to_stablehlo(model: Model, compute: Callable) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
    """The serialised artefact of `jax.export`, and what computes it."""
    config = model.config
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_channels), jnp.uint8)
    content = jax.export.export(jax.jit(compute), platforms=PLATFORMS)(pixels).serialize()
    return bytes(content), lambda images: np.asarray(jax.export.deserialize(content).call(images))


def to_onnx(model: Model, compute: Callable) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
    """An ONNX model, self-contained, and what computes it."""
    config = model.config
    if (config.dtype, config.param_dtype) != ("float32", "float32"):
        raise InputError(
            f"ONNX cannot hold this model: it computes in {config.dtype} with parameters in {config.param_dtype}, and "
            "ONNX Runtime has no bfloat16 on a CPU; export it with both in float32, or as stablehlo"
        )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    if size > LARGEST_ONNX:
        raise InputError(f"ONNX cannot hold this model: {size:,} bytes of parameters, and one file has 2 GB at most")
    logging.disable(logging.WARNING)  # of every frontend that jax2onnx has and that is not installed
    try:
        import jax2onnx
        import onnxruntime

        output = output_name(model)
        pixels = jax.ShapeDtypeStruct(("batch", *config.image_size, config.in_channels), jnp.uint8)
        names = {"input_names": ["pixels"], "output_names": [output], "model_name": config.name}
        proto = jax2onnx.to_onnx(compute, [pixels], **names)
    except ImportError as error:
        raise InputError(f"ONNX needs {error.name}, which is not installed: {INSTALL_ONNX}") from error
    finally:
        logging.disable(logging.NOTSET)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: session.run([output], {"pixels": images})[0]


def _difference(model: Model, run: Callable) -> float:
    shape = (3, *model.config.image_size, model.config.in_channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.asarray(jax.jit(logits_of(model))(pixels), np.float64)
    return float(np.max(np.abs(run(pixels) - expected)) / max(1.0, np.abs(expected).max()))


def _describe(model: Model, compute: Callable, format: str) -> dict:
    known = description_of(model)
    height, width = known.preprocessing.image_size
    one = jax.ShapeDtypeStruct((1, height, width, known.config.in_channels), jnp.uint8)
    width_of_output = jax.eval_shape(compute, one).shape[1]
    return {
        "model": known.config.name,
        "format": format,
        "input": {"name": "pixels", "dtype": "uint8", "shape": ["batch", height, width, known.config.in_channels]},
        "output": {"name": output_name(model), "dtype": "float32", "shape": ["batch", width_of_output]},
        "preprocessing": f"shorter side to floor(size / crop), {known.preprocessing.interpolation} with antialiasing; "
        "centre cut out; 0 to 255",
        "crop": known.preprocessing.crop,
        "task": known.outputs.task,
        "thresholds": known.outputs.thresholds,
        "class_names": known.class_names,
    }
