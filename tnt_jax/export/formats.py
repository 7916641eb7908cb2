"""The formats of one file, a row of `FORMATS` each: how a model becomes its bytes, and what computes them."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from tnt_jax.config import InputError
from tnt_jax.data.mixing import normalise
from tnt_jax.data.samples import full_scale_of, to_depth
from tnt_jax.export.onnx_graph import simplify
from tnt_jax.models.variants import Model, with_formulation
from tnt_jax.storage.description import description_of
from tnt_jax.tasks.table import TASKS

PLATFORMS = ("cpu", "cuda", "tpu")
MAX_ONNX_SIZE = 2**31 - 1  # bytes: what a protobuf message can hold
OPSET = 17  # the first that has LayerNormalization, read by ONNX Runtime from 1.12 on
OPSETS = range(17, 24)
INSTALL_ONNX = (
    "pip install onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 && pip install --no-deps jax2onnx==0.17.1 "
    "(--no-deps, because jax2onnx declares an older Orbax than ours and does not use it)"
)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The pixels that a file takes: whole numbers of 8 bits, or numbers whose white is said."""

    white: float | None = None
    """None for uint8, whose white is 255."""

    @classmethod
    def of(cls, model: Model, images: np.ndarray | None) -> "Samples":
        """Those that the model was trained on: its own white, or that of images as they are read (255, 65535 or 1)."""
        white = description_of(model).preprocessing.white
        if white is None and images is not None and images.dtype != np.uint8:
            white = float(full_scale_of(images.dtype))
        return cls(white)

    @property
    def dtype(self) -> str:
        return "uint8" if self.white is None else "float32"

    def of_read(self, images: np.ndarray) -> np.ndarray:
        """Images as they are read, whose white is that of their type, as the file takes them."""
        return images if self.white is None else to_depth(images, "float32") * np.float32(self.white)

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Images of noise, from black to white."""
        rng = np.random.default_rng(0)
        if self.white is None:
            return rng.integers(0, 256, shape, np.uint8)
        return (rng.random(shape) * self.white).astype(np.float32)


EIGHT_BITS = Samples()


def logits_of(model: Model, change: Callable[[Model], None] | None = None, samples: Samples = EIGHT_BITS) -> Callable:
    """The function that is exported: from pixels (batch, height, width, channels) to float32 logits (batch, classes).

    Of a regression, to values in the units of the targets. Of a model with `num_classes=0`, to its features. Products
    of float32 matrices are exact to float32 on every platform, so that a file is compared with what a CPU computes.

    Args:
        change: replaces modules of the model that is traced.
        samples: the pixels that it takes.
    """
    graphdef, state = nnx.split(model)
    preprocessing, outputs = description_of(model).preprocessing, description_of(model).outputs
    scale, offset = (
        None if each is None else np.array(each, np.float32) for each in (outputs.target_std, outputs.target_mean)
    )

    def logits(pixels: Num[Array, "batch height width channels"]) -> Float[Array, "batch *places classes"]:
        with jax.default_matmul_precision("highest"):
            traced = nnx.merge(graphdef, state)
            if change is not None:
                change(traced)
            pixels = pixels if samples.white is None else pixels / np.float32(samples.white)
            found = traced(normalise(pixels, preprocessing)).astype(jnp.float32)
            return found if scale is None else found * scale + offset

    return logits


def output_name(model: Model) -> str:
    """The name of a file's output."""
    return "logits" if TASKS[description_of(model).outputs.task].has_probabilities else "values"


def of_equations(model: Model, dtype: str) -> Model:
    """The same model without kernels, which nobody has who does not have this code, computing in a dtype."""
    plain = with_formulation(model, "reference", dtype=dtype)
    if dtype == "float32":  # parameters too: no runtime of ONNX on a CPU has bfloat16
        nnx.update(plain, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(plain)))
    plain.description = description_of(model)
    return plain


def to_stablehlo(
    model: Model, compute: Callable, *, samples: Samples = EIGHT_BITS
) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
    """The serialised artefact of `jax.export`, and what computes it."""
    config = model.config
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_channels), samples.dtype)
    content = jax.export.export(jax.jit(compute), platforms=PLATFORMS)(pixels).serialize()
    return bytes(content), lambda images: np.asarray(jax.export.deserialize(content).call(images))


def to_onnx(
    model: Model,
    compute: Callable,
    outputs: tuple[str, ...] = (),
    *,
    samples: Samples = EIGHT_BITS,
    opset: int = OPSET,
) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
    """An ONNX model, self-contained, and what computes its first output; `outputs` names what `compute` returns."""
    config = model.config
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(nnx.state(model)))
    if size > MAX_ONNX_SIZE:
        raise InputError(f"ONNX cannot hold this model: {size:,} bytes of parameters, and one file has 2 GB at most")
    logging.disable(logging.WARNING)  # of every frontend that jax2onnx has and that is not installed
    try:
        import jax2onnx
        import onnxruntime

        outputs = outputs or (output_name(model),)
        pixels = jax.ShapeDtypeStruct(("batch", *config.image_size, config.in_channels), samples.dtype)
        names = {"input_names": ["pixels"], "output_names": list(outputs), "model_name": config.name}
        proto = jax2onnx.to_onnx(compute, [pixels], opset=opset, **names)
    except ImportError as error:
        raise InputError(f"ONNX needs {error.name}, which is not installed: {INSTALL_ONNX}") from error
    finally:
        logging.disable(logging.NOTSET)
    simplify(proto)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: session.run([outputs[0]], {"pixels": images})[0]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of one file."""

    suffix: str
    write: Callable
    dtypes: tuple[Literal["float32", "bfloat16"], ...]
    """Those that a file can compute in; what was trained in another is written in the first."""
    packages: tuple[str, ...]
    """Whose versions are noted."""
    limits: tuple[str, ...]
    """For people: what the format does not hold."""


FORMATS = {
    "stablehlo": Format(
        ".stablehlo",
        to_stablehlo,
        ("float32", "bfloat16"),
        ("jax", "jaxlib", "flax"),
        (
            "it evaluates and cannot be trained: there is no gradient in it",
            "images have one size; the number of images is free",
            "it runs where JAX or another runtime of StableHLO is, on " + ", ".join(PLATFORMS),
        ),
    ),
    "onnx": Format(
        ".onnx",
        to_onnx,
        ("float32",),
        ("jax", "flax", "jax2onnx", "onnx", "onnxruntime"),
        (
            "it evaluates and cannot be trained",
            "images have one size; the number of images is free",
            "it is float32: ONNX Runtime has no bfloat16 on a CPU",
        ),
    ),
}
