"""What a model becomes in a format: bytes, and what computes them."""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from tnt_jax.config import InputError
from tnt_jax.data.mixing import normalise
from tnt_jax.export.onnx_graph import simplify
from tnt_jax.models.variants import Model, with_formulation
from tnt_jax.storage.description import description_of

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST_ONNX = 2**31 - 1  # bytes: what a protobuf message can hold
INSTALL_ONNX = (
    "pip install onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 && pip install --no-deps jax2onnx==0.17.1 "
    "(--no-deps, because jax2onnx declares an older Orbax than ours and does not use it)"
)


def logits_of(model: Model, change: Callable[[Model], None] | None = None) -> Callable[[Array], Array]:
    """What is exported: the function from uint8 pixels (batch, height, width, channels) to logits (batch, classes).

    Of a regression, to values in the units of the targets. Of a model with `num_classes=0`, to its features. Products
    of float32 matrices are exact to float32 on every platform, so that a file is compared with what a CPU computes.

    Args:
        change: replaces modules of the model that is traced.
    """
    graphdef, state = nnx.split(model)
    preprocessing, outputs = description_of(model).preprocessing, description_of(model).outputs
    scale, offset = (
        None if each is None else np.array(each, np.float32) for each in (outputs.target_std, outputs.target_mean)
    )

    def logits(pixels: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        with jax.default_matmul_precision("highest"):
            traced = nnx.merge(graphdef, state)
            if change is not None:
                change(traced)
            found = traced(normalise(pixels, preprocessing))
            return found if scale is None else found.astype(jnp.float32) * scale + offset

    return logits


def output_name(model: Model) -> str:
    """What the output of a file is called."""
    return "values" if description_of(model).outputs.task == "regression" else "logits"


def of_equations(model: Model) -> Model:
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


def to_onnx(
    model: Model, compute: Callable, outputs: tuple[str, ...] = ()
) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
    """An ONNX model, self-contained, and what computes its first output; `outputs` names what `compute` returns."""
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

        outputs = outputs or (output_name(model),)
        pixels = jax.ShapeDtypeStruct(("batch", *config.image_size, config.in_channels), jnp.uint8)
        names = {"input_names": ["pixels"], "output_names": list(outputs), "model_name": config.name}
        proto = jax2onnx.to_onnx(compute, [pixels], **names)
    except ImportError as error:
        raise InputError(f"ONNX needs {error.name}, which is not installed: {INSTALL_ONNX}") from error
    finally:
        logging.disable(logging.NOTSET)
    simplify(proto)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: session.run([outputs[0]], {"pixels": images})[0]
