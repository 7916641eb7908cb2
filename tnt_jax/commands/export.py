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
    """Writes a model as others read it: a file that needs none of this code, or a repository of the hub."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    format: Literal["stablehlo", "onnx", "hub"]
    """StableHLO, which JAX loads without this code; ONNX; or a folder that timm and transformers load."""
    out: str | None = None
    """What to write; by default the name of the model with .stablehlo or .onnx, or -hub for a folder."""
    push: str | None = None
    """For hub: also upload it as OWNER/NAME."""
    results: str | None = None
    """For hub: a .csv that `eval.py --table` wrote, for the model card."""
    license: str | None = None
    """For hub: the licence of the weights, such as apache-2.0, for the model card."""
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
    from tnt_jax.export import SUFFIXES, export_model
    from tnt_jax.storage.load import load_model

    out, model = arguments.out or name + SUFFIXES[arguments.format], load_model(arguments.model)
    images = _images(arguments.model, model)
    done = export_model(model, out, arguments.format, images=images, overwrite=arguments.overwrite)
    print(f"{done.path}: {done.size:,} bytes; its logits and the model's differ by {done.difference:.1e} at most")
    for limit in done.limits:
        print(f"note: {limit}")


def _images(path: str, model):
    """Images that the file is compared with: test images of a run, or two photographs where it takes colour."""
    import numpy as np

    from tnt_jax.data.crop import evaluation_crop
    from tnt_jax.evaluation.evaluate import open_test, test_data
    from tnt_jax.storage.description import description_of
    from tnt_jax.storage.resolve import is_run

    config, preprocessing = model.config, description_of(model).preprocessing
    images = []
    if is_run(path):
        (data,) = test_data(path, (), description_of(model).outputs.task)
        try:
            source = open_test(data)
            images = [source[index][0] for index in range(min(8, len(source)))]
        except InputError as error:
            print(f"note: no test image of the run was compared: {error}")
    elif config.in_channels == 3:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    images = [image for image in images if image.shape[2] == config.in_channels and image.dtype == np.uint8]
    cut = (preprocessing.image_size, preprocessing.crop, preprocessing.interpolation)
    return np.stack([evaluation_crop(image, *cut) for image in images]) if images else None


def _to_hub(arguments: Arguments, out: str) -> None:
    from tnt_jax.storage.folder import check_destination
    from tnt_jax.storage.hub import check_push
    from tnt_jax.storage.load import load_model
    from tnt_jax.storage.publish import publish

    check_destination(out, overwrite=arguments.overwrite)
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
