"""Calibrated probabilities: `python -m tnt_jax.commands.calibrate MODEL --out FOLDER [--split NAME]`."""

import dataclasses
from typing import Annotated

import tyro

from tnt_jax.commands.cli import Flag, command
from tnt_jax.config import InputError
from tnt_jax.tasks.table import metric_of


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a model whose probabilities are right as often as they say: its logits are divided by one temperature,
    fitted to images that it was not trained on. Labels (multi_label) get the threshold of their highest F1 as well.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    out: str
    """The folder to write the model to."""
    source: str | None = None
    """The source of images, as for eval.py; a training run knows its own."""
    split: str | None = None
    """The images that are fitted to: neither those of training nor those that eval.py reports. By default those that
    training evaluates, such as `val`."""
    overwrite: Flag = False
    """Replace a model that is there."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.evaluation.calibration import calibrate, calibrated, validation_split
    from tnt_jax.evaluation.evaluate import test_data
    from tnt_jax.storage.description import description_of
    from tnt_jax.storage.folder import check_destination, save_model
    from tnt_jax.storage.load import load_model

    check_destination(arguments.out, overwrite=arguments.overwrite)
    model = load_model(arguments.model)
    described = description_of(model)
    if not described.config.num_classes:
        raise InputError(f"{arguments.model} has features, and no classes to calibrate")
    (data,) = test_data(arguments.model, [arguments.source] if arguments.source else [], described.outputs.task)
    images = validation_split(data, arguments.split)
    found = calibrate(model, images, data)
    noted = {"calibrated on": f"{len(images)} images of {data.source}, {images.name}"}
    save_model(calibrated(model, found, noted), arguments.out, overwrite=arguments.overwrite)
    print(f"temperature {found.temperature:.4g}, fitted to {found.images:,} images of {data.source}, {images.name}")
    print("before and after on the same images, so what is after is a little flattered:")
    for name, before in found.before.items():
        metric = metric_of(name)
        print(f"{metric.title}: {metric.text(before)} before, {metric.text(found.after[name])} after")
    if found.thresholds is not None:
        for name, threshold in zip(images.class_names, found.thresholds, strict=True):
            print(f"threshold of {name}: {threshold:.4g}")
    print(f"The model lies in {arguments.out}.")


if __name__ == "__main__":
    main()
