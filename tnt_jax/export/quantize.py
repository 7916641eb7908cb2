"""An ONNX model in 8 bits, by ONNX Runtime's static quantisation of matrix products and convolutions, measured before
it is called done.

Weights are int8 with a scale for each output channel, activations uint8 with the ranges that calibration images have.
Norms, softmax, GELU and the products of attention, which have no weights, stay in float32.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Num

from tnt_jax.config import InputError
from tnt_jax.export.formats import INSTALL_ONNX

Pixels = Num[np.ndarray, "images height width channels"]
BATCH = 8
QUANTIZED = ("MatMul", "Conv")
COMPARED = 4  # calibration images that tell how much each layer loses


@dataclasses.dataclass(frozen=True)
class Judged:
    """The images by which a quantised model is made and measured."""

    calibration: Pixels
    """Training images, as evaluation cuts them."""
    images: Pixels
    """Test images."""
    labels: Int[np.ndarray, " images"] | None
    """Their classes; without them, the predictions of the float32 model count as right."""
    data: str
    """The source of the images."""
    tolerance: float = 0.01
    """Proportion of the calibration images whose prediction may change."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A file in 8 bits and what it is worth."""

    content: bytes
    report: dict[str, Any]
    """For the description: calibration, top-1 before and after, and the layers that stayed in float32."""


def quantize(content: bytes, judged: Judged, parameters: Mapping[str, np.ndarray]) -> Quantized:
    """The int8 form of a float32 ONNX file.

    While it differs from float32 on more of the calibration images than the tolerance, the layers that lose most are
    kept in float32, an eighth of all at a time. The test images choose nothing: they measure the file that is written.

    Args:
        content: an ONNX model from pixels to logits.
        parameters: of the model by their paths, which give the layers their names.

    Raises:
        InputError: there are no calibration or test images, ONNX Runtime's tools are not installed, or half of the
            layers in float32 are not enough.
    """
    for images, what in ((judged.calibration, "calibrate with"), (judged.images, "measure on")):
        if not len(images):
            raise InputError(f"{judged.data} has no images to {what}")
    with tempfile.TemporaryDirectory() as folder:
        simplified = _simplified(content, Path(folder) / "simplified.onnx")
        layers = _layers(simplified, parameters)
        exact = simplified.read_bytes()
        expected = _predictions(exact, judged.calibration)
        kept: list[str] = []
        ranked: list[str] | None = None
        while True:
            file = _static(simplified, Path(folder) / "int8.onnx", judged.calibration, kept)
            lost = float((_predictions(file.read_bytes(), judged.calibration) != expected).mean())
            if lost <= judged.tolerance:
                break
            ranked = ranked or _worst_first(simplified, file, judged.calibration[:COMPARED], layers)
            if 2 * len(kept) >= len(layers):
                raise InputError(
                    f"int8 predicts another class for {100 * lost:.1f}% of the calibration images with half of the "
                    f"layers in float32, more than --tolerance {100 * judged.tolerance:g}; those that lose most are "
                    f"{', '.join(layers[name] for name in ranked[:5])}"
                )
            kept = ranked[: len(kept) + max(1, len(layers) // 8)]
        before, after = (_predictions(each, judged.images) for each in (exact, file.read_bytes()))
        truth = before if judged.labels is None else judged.labels
        right = [float((each == truth).mean()) for each in (before, after)]
        compact = _compact(file)
    report = {
        "weights": "int8, a scale for each output channel",
        "activations": "uint8, ranges of the calibration images",
        "calibration_images": len(judged.calibration),
        "measured_on": f"{judged.data}, {len(judged.images)} images",
        "top1_is": "accuracy" if judged.labels is not None else "agreement with float32",
        "top1_float32": right[0],
        "top1_int8": right[1],
        "layers": len(layers),
        "kept_in_float32": sorted(layers[name] for name in kept),
    }
    return Quantized(compact, report)


def _tools():
    try:
        import onnx
        import onnxruntime.quantization

        return onnx, onnxruntime.quantization
    except ImportError as error:
        raise InputError(f"int8 needs {error.name}, which is not installed: {INSTALL_ONNX}") from error


def _simplified(content: bytes, path: Path) -> Path:
    """The same model with constants folded; products and the biases behind them stay apart, as scales need them."""
    _tools()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    return path


def _layers(path: Path, parameters: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The names of the products and convolutions with weights, and what their weights are called in the model."""
    onnx, _ = _tools()
    graph = onnx.load(path).graph
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    by_content = {np.ascontiguousarray(value).tobytes(): name for name, value in parameters.items()}
    # ONNX has the channels of a convolution first.
    by_content |= {value.transpose(3, 2, 0, 1).tobytes(): name for name, value in parameters.items() if value.ndim == 4}
    return {
        node.name: by_content.get(weights[node.input[1]].tobytes(), node.name).removesuffix(".kernel")
        for node in graph.node
        if node.op_type in QUANTIZED and node.input[1] in weights
    }


def _session(content: bytes):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _predictions(content: bytes, images: Pixels) -> Int[np.ndarray, " images"]:
    session = _session(content)
    parts = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
    return np.concatenate([session.run(None, {"pixels": part})[0].argmax(axis=-1) for part in parts])


def _reader(images: Pixels):
    _, quantization = _tools()

    class Reader(quantization.CalibrationDataReader):
        """Hands out the images, a batch at a time."""

        def __init__(self):
            self.parts = iter([images[first : first + BATCH] for first in range(0, len(images), BATCH)])

        def get_next(self) -> dict[str, Pixels] | None:
            part = next(self.parts, None)
            return None if part is None else {"pixels": part}

    return Reader()


def _static(path: Path, to: Path, images: Pixels, kept: Sequence[str]) -> Path:
    _, quantization = _tools()
    logging.disable(logging.WARNING)  # that the model was not preprocessed by a tool that does not know symbolic sizes
    try:
        quantization.quantize_static(
            str(path),
            str(to),
            _reader(images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=list(kept),
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.disable(logging.NOTSET)
    return to


def _worst_first(path: Path, quantized: Path, images: Pixels, layers: Mapping[str, str]) -> list[str]:
    """The layers by the noise that each adds to what its inputs have already, the noisiest first."""
    onnx, _ = _tools()
    nodes = [node for node in onnx.load(path).graph.node if node.name in layers]
    wanted = sorted({name for node in nodes for name in (node.input[0], node.output[0])})
    exact, rounded = (_intermediates(each, wanted, images) for each in (path, quantized))

    def noise(name: str) -> float:
        """Of a result or an input, its square over that of the signal."""
        return float(((rounded[name] - exact[name]) ** 2).sum() / max((exact[name] ** 2).sum(), 1e-30))

    added = {node.name: noise(node.output[0]) - noise(node.input[0]) for node in nodes}
    return sorted(layers, key=lambda name: -added[name])


def _intermediates(path: Path, names: Sequence[str], images: Pixels) -> dict[str, np.ndarray]:
    """The values inside a file's graph, by the names of its tensors."""
    onnx, _ = _tools()
    model = onnx.load(path)
    ends = {each.name for each in (*model.graph.input, *model.graph.output)}
    for name in names:
        if name not in ends:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    found = _session(model.SerializeToString()).run(list(names), {"pixels": images})
    return dict(zip(names, (each.astype(np.float64) for each in found), strict=True))


def _compact(path: Path) -> bytes:
    """The file without names and shapes that nobody reads: a third of what is not weights."""
    onnx, _ = _tools()
    model = onnx.load(path)
    graph = model.graph
    del graph.value_info[:]
    ends = {each.name for each in (*graph.input, *graph.output)}
    short: dict[str, str] = {"": ""}

    def renamed(name: str) -> str:
        return name if name in ends else short.setdefault(name, np.base_repr(len(short), 36))

    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [renamed(name) for name in names]
    for each in graph.initializer:
        each.name = renamed(each.name)
    onnx.checker.check_model(model)
    return model.SerializeToString()
