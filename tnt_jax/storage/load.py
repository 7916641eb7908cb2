"""A model from wherever it lies: a model folder, a training run, or a published name."""

import os
from pathlib import Path
from typing import Literal

from tnt_jax.config import InputError
from tnt_jax.models.variants import Model, get_variant
from tnt_jax.storage.folder import load_folder
from tnt_jax.storage.run import is_run
from tnt_jax.storage.trained import load_run

WEIGHTS_FOLDER = Path("weights")


def load_model(path: str | os.PathLike, *, weights: Literal["ema", "raw"] = "ema", step: int | None = None) -> Model:
    """A model from its folder, from a training run's folder, or by its published name from `weights/NAME`.

    Args:
        weights: of a training run: the average of the parameters over the steps, or the parameters themselves.
        step: of a training run: one whose checkpoint is kept; by default the best on the test images.

    Raises:
        InputError: it is not there, or it is damaged; for a published name the message says how to get the weights.
    """
    if is_run(path):
        return load_run(path, weights=weights, step=step)
    if Path(path).is_dir():
        return load_folder(path)
    if Path(path).is_file():
        raise InputError(
            f"{path} is a file, and a model is a folder; make one with: "
            f"python convert_torch_weights.py {path} {WEIGHTS_FOLDER}/NAME"
        )
    try:
        variant = get_variant(str(path))
    except InputError as error:
        raise InputError(f"there is no folder {path}, and {error}") from error
    folder = WEIGHTS_FOLDER / variant.config.name
    if folder.is_dir():
        model = load_folder(folder)
        if model.config.architecture != variant.config.architecture:
            raise InputError(f"{folder} holds {model.config.name}, and {path} is {variant.config.name}")
        return model
    if not variant.weights:
        raise InputError(f"nobody has published weights of {path}, and there are none in {folder}")
    addresses = [place for place in variant.weights if place.startswith("https://")]
    on_hub = [place for place in variant.weights if place not in addresses]
    raise InputError(
        f"the weights of {path} are not in {folder}. To get them:\n"
        + "\n".join(f"  python convert_torch_weights.py {place} {folder}" for place in on_hub or ["FILE"])
        + ("\nor download one of these and give its file instead:\n" if on_hub else "\nwith the FILE from here:\n")
        + "\n".join(f"  {place}" for place in addresses)
    )
