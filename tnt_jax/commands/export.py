"""A model for others: `python export.py MODEL --format stablehlo|onnx|hub [--out FILE_OR_FOLDER]`."""

import csv
import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tnt_jax.commands.cli import Flag, command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a model as others read it: a file that needs none of this code, a page, or a repository of the hub."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    format: Literal["stablehlo", "onnx", "hub", "web"]
    """StableHLO, which JAX loads without this code; ONNX; a folder that timm and transformers load; or a folder with a
    page that runs the model in a browser, on any static server."""
    out: str | None = None
    """The file or folder to write; by default the model's name with .stablehlo or .onnx, or -hub or -web."""
    push: str | None = None
    """For hub: also upload it as OWNER/NAME."""
    results: str | None = None
    """For hub: a .csv that `eval.py --table` wrote, for the model card."""
    license: str | None = None
    """For hub: the licence of the weights, such as apache-2.0, for the model card."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype in which the file computes, whatever the model was trained in; bfloat16 for stablehlo."""
    opset: int | None = None
    """For onnx: the version of the operators, by default 17, which runtimes read since 2022."""
    quantize: Literal["int8"] | None = None
    """For onnx: matrix products in 8 bits, calibrated on training images and measured on test images."""
    tolerance: float = 1.0
    """For int8: percent of the calibration images whose prediction may change; layers that lose most stay in float32
    until it fits."""
    source: str | None = None
    """The source of images that the file is compared with and int8 is made with; a training run knows its own."""
    overwrite: Flag = False
    """Replace what exists."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    name = re.sub(r"\.(pth|pth\.tar|safetensors|pt|bin|ckpt)$", "", Path(arguments.model.rpartition(":")[2]).name)
    if arguments.format == "hub":
        _to_hub(arguments, arguments.out or f"{name}-hub")
        return
    for option in ("push", "results", "license"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option} is for --format hub, and --format is {arguments.format}")
    from tnt_jax.export import FORMATS, export_model, export_web
    from tnt_jax.storage.load import load_model

    if arguments.opset is not None and arguments.format != "onnx":
        raise InputError(f"--opset is for --format onnx, and --format is {arguments.format}")
    if arguments.dtype != "float32" and arguments.format != "stablehlo":
        raise InputError(f"--dtype {arguments.dtype} is for --format stablehlo, and --format is {arguments.format}")
    suffix = FORMATS[arguments.format].suffix if arguments.format in FORMATS else "-web"
    out, model = arguments.out or name + suffix, load_model(arguments.model)
    if arguments.quantize and arguments.format != "onnx":
        raise InputError(f"--quantize is for --format onnx, and --format is {arguments.format}")
    if not 0 <= arguments.tolerance <= 100:
        raise InputError(f"--tolerance is {arguments.tolerance}, and must lie between 0 and 100 points")
    images, int8 = _images(arguments, model)
    if arguments.format == "web":
        done = export_web(model, out, images=images, overwrite=arguments.overwrite)
        print(f"{done.path}: {done.size:,} bytes; python -m http.server -d {done.path} serves it")
        return
    options = {"dtype": arguments.dtype} | ({} if arguments.opset is None else {"opset": arguments.opset})
    options |= {"images": images, "int8": int8, "overwrite": arguments.overwrite}
    done = export_model(model, out, arguments.format, **options)
    print(f"{done.path}: {done.size:,} bytes; its logits and the model's differ by {done.difference:.1e} at most")
    if done.quantization:
        _tell_int8(done.quantization)
    for limit in done.limits:
        print(f"note: {limit}")


def _tell_int8(report: dict) -> None:
    before, after = (f"{100 * report[f'top1_{form}']:.2f}%" for form in ("float32", "int8"))
    print(f"int8: {report['top1_is']} {before} -> {after} ({report['measured_on']})")
    if report["kept_in_float32"]:
        print(f"note: in float32 stayed {', '.join(report['kept_in_float32'])}")


COMPARED, CALIBRATED, JUDGED = 8, 256, 2000
"""Images that a file is compared with, that int8 is calibrated with, and that it is measured on, at most."""


def _images(arguments: Arguments, model) -> tuple:
    """The images that the file is compared with, and what int8 is made with and measured on, where it is asked for.

    They are those of the run or of --source; or, without either, parts of two photographs, which have no classes.
    """
    import numpy as np

    from tnt_jax.data.crop import evaluation_crop
    from tnt_jax.data.opening import open_split
    from tnt_jax.data.samples import to_channels
    from tnt_jax.evaluation.evaluate import open_test, test_data
    from tnt_jax.export.quantize import Judged
    from tnt_jax.storage.description import description_of
    from tnt_jax.storage.run import is_run

    described = description_of(model)
    if not arguments.source and not is_run(arguments.model):
        parts = _photographs(model) if model.config.in_channels == 3 else []
        if arguments.quantize and not parts:
            raise InputError(
                f"--source must say what to calibrate with: {arguments.model} is no run, and not of colours"
            )
        images = np.stack(parts) if parts else None
        if not arguments.quantize:
            return None if images is None else images[:COMPARED], None
        judged = Judged(images[::2], images[1::2], None, "parts of two photographs", arguments.tolerance / 100)
        return images[:COMPARED], judged
    (data,) = test_data(arguments.model, [arguments.source] if arguments.source else (), described.outputs.task)
    preprocessing = described.preprocessing
    cut = (preprocessing.image_size, preprocessing.crop, preprocessing.interpolation)

    def cut_out(source, count: int) -> tuple:
        chosen = np.unique(np.linspace(0, len(source) - 1, count).astype(int)) if len(source) else ()
        read = [source[int(index)] for index in chosen]
        channels = model.config.in_channels
        images = [evaluation_crop(to_channels(image, channels), *cut) for image, _ in read]
        return np.stack(images) if images else np.zeros((0,), np.uint8), [target for _, target in read]

    if not arguments.quantize:
        try:
            return cut_out(open_test(data), COMPARED)[0], None
        except InputError as error:
            print(f"note: only noise is compared, and no image, and the file takes 8 bits: {error}")
            return None, None
    reported = open_test(data)
    test, labels = cut_out(reported, JUDGED)
    calibration, _ = cut_out(open_split(data, data.train_split), CALIBRATED)
    labels = _in_classes_of(model, reported, data, labels)
    return test[:COMPARED], Judged(
        calibration, test, labels, f"{data.source}, {reported.name}", arguments.tolerance / 100
    )


def _in_classes_of(model, source, data, labels: list):
    """Labels as numbers of the model's classes."""
    import numpy as np

    from tnt_jax.evaluation.evaluate import match_of

    return np.arange(model.config.num_classes)[match_of(model, source, data).of_model][np.array(labels)]


def _photographs(model) -> list:
    """Parts of the two photographs that scikit-learn ships, as evaluation would cut them out."""
    import numpy as np
    from sklearn.datasets import load_sample_images

    from tnt_jax.data.crop import evaluation_crop
    from tnt_jax.storage.description import description_of

    preprocessing, rng, parts = description_of(model).preprocessing, np.random.default_rng(0), []
    cut = (preprocessing.image_size, preprocessing.crop, preprocessing.interpolation)
    for photograph in load_sample_images().images:
        height, width = photograph.shape[:2]
        parts.append(evaluation_crop(photograph, *cut))
        for side in rng.integers(min(height, width) // 3, min(height, width), 63):
            top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
            parts.append(evaluation_crop(photograph[top : top + side, left : left + side], *cut))
    return [parts[index] for index in rng.permutation(len(parts))]


def _to_hub(arguments: Arguments, out: str) -> None:
    from tnt_jax.storage.folder import check_destination
    from tnt_jax.storage.hub import check_push
    from tnt_jax.storage.load import load_model
    from tnt_jax.storage.publish import FILES, publish

    check_destination(out, overwrite=arguments.overwrite, names=FILES)
    if arguments.push:
        check_push(arguments.push)
    results = _rows(arguments.results) if arguments.results else ()
    done = publish(
        load_model(arguments.model),
        out,
        push=arguments.push,
        results=results,
        licence=arguments.license,
        overwrite=arguments.overwrite,
    )
    readers = ", ".join(done.readers)
    print(f"{done.folder}: {done.size:,} bytes of weights, which give the model back; read by {readers}")
    if done.address:
        print(f"pushed to {done.address}")


def _rows(path: str) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table of results: {error}") from error
    if not rows or "data" not in rows[0]:
        raise InputError(f"{path} is no table of results; eval.py --table FILE.csv writes one")
    return [{name: value for name, value in row.items() if name and value and name != "model"} for row in rows]
