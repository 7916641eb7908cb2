"""Temperature scaling and label thresholds, from images that were neither trained on nor are reported."""

import dataclasses
import os

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.opening import open_reported, open_split
from tnt_jax.data.sources import NoSplitError, Split
from tnt_jax.evaluation.evaluate import outputs_of
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import description_of
from tnt_jax.tasks.calibration import Calibration
from tnt_jax.tasks.table import TASKS


def calibrate(model: Model, images: Split, data: DataConfig, *, batch_size: int = 64) -> Calibration:
    """The temperature of a model, and its thresholds, for the images of a split that it was not trained on.

    The temperature is the one number that makes the cross-entropy of softmax(logits / temperature) least, or of the
    sigmoids: Guo et al., arXiv 1706.04599. It changes no order of predictions. The threshold of a label is that of its
    highest F1.

    Raises:
        InputError: the model is a regression, the images are of another task or classes, or no temperature is best: all
            are predicted right, or it lies at the end of the range that is searched.
    """
    task = TASKS[description_of(model).outputs.task]
    if not task.has_probabilities:
        raise InputError(f"the model is a {task.name}: it has no probabilities to calibrate")
    if task.dense:
        raise InputError(f"probabilities of whole images are calibrated, and the model is a {task.name}")
    labels, (logits,), _ = outputs_of([model], images, data, batch_size=batch_size)
    return task.calibrate(logits.astype(np.float64), labels, data.source)


def calibrated(model: Model, found: Calibration, source: dict) -> Model:
    """The same model with its head divided by the temperature, and with the thresholds.

    Whatever reads the model then has calibrated logits: predictions, exports, timm.

    Args:
        source: what is noted of where the numbers come from.
    """
    from flax import nnx

    changed = nnx.clone(model)
    for parameter in (changed.head.kernel, changed.head.bias):
        parameter[...] = (parameter[...] / found.temperature).astype(parameter[...].dtype)
    described = description_of(model)
    thresholds = None if found.thresholds is None else tuple(found.thresholds.tolist())
    changed.description = dataclasses.replace(
        described,
        outputs=dataclasses.replace(described.outputs, thresholds=thresholds),
        source={**(described.source or {}), "temperature": found.temperature, **source},
        checksums=None,
    )
    return changed


def validation_split(data: DataConfig, split: str | None) -> Split:
    """The images to calibrate on, by default those that training evaluates.

    Raises:
        InputError: the split is not there, or it has images that the model was trained on, where its probabilities are
            too sure, or those that evaluation reports, which would then be chosen and reported on the same images.
    """
    try:
        images = open_split(data, split)
    except NoSplitError as error:
        raise InputError(f"{error}; name another with --split, one that was not trained on") from error
    others = ((lambda: open_split(data, data.train_split), "the model was trained on"),)
    for opened, what in (*others, (lambda: open_reported(data), "eval.py reports")):
        try:
            other = opened()
        except InputError:
            continue
        if _overlaps(images, other):
            raise InputError(
                f"split {images.name} of {data.source} has images that {what} (split {other.name}): calibrate on "
                "others, named with --split, such as a part of the training images that was left out with "
                "--data.holdout"
            )
    return images


def _overlaps(images: Split, others: Split) -> bool:
    """True if two splits share an image: by the paths of files, and else by the names of the splits, slices aside."""
    if images.files is None or others.files is None:
        names = images.name, others.name
        return len({name.partition("[")[0] for name in names}) == 1 and not all("[" in name for name in names)
    paths = {os.path.normpath(path) for path in others.images}
    return any(os.path.normpath(path) in paths for path in images.images)
