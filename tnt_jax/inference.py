"""Prediction by a model's task: pixels on the host, normalising and everything after it on the device."""

import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.augment import fill_of
from tnt_jax.data.crop import evaluated
from tnt_jax.data.decode import ImageSource, Reading, read_image
from tnt_jax.data.mixing import normalise
from tnt_jax.data.moving import fitted
from tnt_jax.data.samples import to_channels, to_depth
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import ModelDescription, Preprocessing, description_of
from tnt_jax.storage.load import load_model
from tnt_jax.tasks.table import TASKS
from tnt_jax.tasks.task import Canvas, Outputs


def inference_model(
    model: Model | str | os.PathLike, image: ImageSource | list[ImageSource]
) -> dict[str, Any] | list[dict[str, Any]]:
    """A model's prediction for an image, or for each image of a list, by its task.

    Args:
        model: a model, or whatever `load_model` takes. To classify many images, load it once.
        image: path, bytes, open binary file, PIL image, or array (height, width, channels) in RGB, of NumPy, JAX or
            PyTorch; or a list of these. White is 255 in uint8, 65535 in uint16 and 1 in floats.

    Returns:
        single_label, with the keys of mmpretrain: pred_label (int), pred_class (its name, or the number as text where
        no names are known), pred_score (its probability), pred_scores (float32 (classes,), of all). The probability of
        a single output is its sigmoid.
        multi_label: pred_labels and pred_classes (lists, of what is at or above its threshold), pred_scores.
        regression: pred_values (dictionary from the name of each target to its value, in its units).
        segmentation: pred_mask (uint16 (height, width), the class of each pixel of the image), pred_shares (dictionary
        from the name of each class that is there to its share of the pixels).
        detection: pred_boxes (float32 (boxes, 4): left, top, right, bottom in pixels of the image, the best first),
        pred_scores, pred_labels and pred_classes of each.

    Raises:
        InputError: an image cannot be read, or the model cannot be loaded or has no classes.
    """
    model = model if isinstance(model, nnx.Module) else load_model(model)
    images = list(image) if isinstance(image, list | tuple) else [image]
    results = list(predict_images(model, images))
    for result in results:
        if isinstance(result, InputError):
            raise result
    return results if isinstance(image, list | tuple) else results[0]


def predict_images(
    model: Model,
    images: Iterable[ImageSource],
    *,
    batch_size: int = 32,
    max_pixels: int = DataConfig.max_pixels,
    zoom: float = 1.0,
) -> Iterator[dict[str, Any] | InputError]:
    """For each image in turn what `inference_model` returns, or the error that says why it cannot be read.

    Images are asked for as they are needed, two batches ahead of what has been predicted, and read on threads. Batches
    have one size, and the last is filled up with black images. Fewer images than `batch_size` are filled up to the next
    power of two, so that a service that gets any number of them compiles the model only a few times.

    Args:
        zoom: segmentation: how much larger than it fits whole into the model's input an image is seen; above 1 it is
            seen in windows that overlap by a half, of which the mean counts.

    Raises:
        InputError: the model has no classes, or the batch size is not positive; or the task has no use for a zoom.
    """
    description = description_of(model)
    if not description.config.num_classes:
        raise InputError(f"{description.config.name} was made with num_classes=0: it has features, and no classes")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, and must be at least 1")
    task = TASKS[description.outputs.task]
    if (zoom != 1 and not task.dense) or not zoom > 0:
        needed = "above 0" if task.dense else f"1 for task {task.name}"
        raise InputError(f"zoom is {zoom:g}, and must be {needed}")
    if task.dense:
        return (_predict_windows(model, image, description, batch_size, max_pixels, zoom) for image in images)
    return _predict(model, iter(images), description, batch_size, max_pixels)


def _predict(
    model: Model, images: Iterator[ImageSource], description: ModelDescription, batch_size: int, max_pixels: int
) -> Iterator[dict[str, Any] | InputError]:
    outputs, names, (graph, state) = description.outputs, description.class_names, nnx.split(model)
    task = TASKS[outputs.task]
    first = list(itertools.islice(images, batch_size))
    batch_size = min(batch_size, 1 << max(0, len(first) - 1).bit_length())
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="images") as pool:

        def read(chosen: list[ImageSource]) -> list[Future]:
            return [pool.submit(_pixels, image, description, max_pixels) for image in chosen]

        reading = read(first)
        while reading:
            # While the device computes this batch, the next one is read.
            following = read(list(itertools.islice(images, batch_size)))
            pixels = [future.result() for future in reading]
            readable = [image for image in pixels if not isinstance(image, InputError)]
            scores = iter(())
            if readable:
                kinds = {str(image.dtype) for image in readable}
                kind = kinds.pop() if len(kinds) == 1 else "float32"
                batch = np.zeros((batch_size, *readable[0].shape), kind)
                batch[: len(readable)] = [to_depth(image, kind) for image in readable]
                computed = np.asarray(probabilities(graph, description.preprocessing, state, batch, outputs.task))
                if not np.isfinite(computed).all():
                    raise _not_finite(description)
                scores = iter(computed)
            for image in pixels:
                yield image if isinstance(image, InputError) else task.result(next(scores), outputs, names)
            reading = following


def _predict_windows(
    model: Model,
    image: ImageSource,
    description: ModelDescription,
    batch_size: int,
    max_pixels: int,
    zoom: float,
) -> dict[str, Any] | InputError:
    """The result of a dense task for an image at its own size, from windows of the size of the model's input."""
    task, shown, (graph, state) = TASKS[description.outputs.task], description.preprocessing, nnx.split(model)
    try:
        pixels = read_image(image, description.config.in_channels, reading=Reading(shown.white, max_pixels))
        pixels = to_channels(pixels, description.config.in_channels)
    except InputError as error:
        return error
    size = shown.image_size
    scale = zoom * min(to / side for to, side in zip(size, pixels.shape[:2], strict=True))
    canvas = tuple(max(to, round(side * scale)) for to, side in zip(size, pixels.shape[:2], strict=True))
    factor = scale / min(to / side for to, side in zip(canvas, pixels.shape[:2], strict=True))
    interpolation = Image.Resampling[shown.interpolation.upper()]
    seen, places = fitted(pixels, canvas, interpolation, fill_of(pixels, shown), factor=factor)
    # The image in the canvas, which is wider only where there is one window.
    inside = [np.flatnonzero(~np.isnan(each)) for each in (places.rows, places.columns)]
    (top, height), (left, width) = ((each[0], len(each)) for each in inside)
    starts = list(itertools.product(*map(_starts, canvas, size)))

    def windows() -> Iterator[tuple[int, int, np.ndarray]]:
        for at in range(0, len(starts), batch_size):
            some = starts[at : at + batch_size]
            batch = np.zeros((1 << (len(some) - 1).bit_length(), *size, seen.shape[2]), seen.dtype)
            for place, (row, column) in zip(batch, some, strict=False):
                place[:] = seen[row : row + size[0], column : column + size[1]]
            computed = np.asarray(probabilities(graph, shown, state, batch, task.name))
            if not np.isfinite(computed).all():
                raise _not_finite(description)
            for found, (row, column) in zip(computed, some, strict=False):
                yield row, column, found

    scores = task.join(windows(), Canvas(size, top, left, height, width, pixels.shape[:2]))
    return task.result(scores, description.outputs, description.class_names)


def _starts(length: int, window: int) -> list[int]:
    """The beginnings of windows that cover a length, each half over the one before it."""
    count = -(-2 * (length - window) // window) + 1
    return np.linspace(0, length - window, count).round().astype(int).tolist()


def _not_finite(description: ModelDescription) -> InputError:
    return InputError(f"{description.config.name} gives scores that are not numbers (NaN): its parameters are damaged")


def _pixels(image: ImageSource, description: ModelDescription, max_pixels: int) -> np.ndarray | InputError:
    try:
        return evaluated(image, description.config.in_channels, description.preprocessing, max_pixels)
    except InputError as error:
        return error


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def probabilities(
    graph: nnx.GraphDef,
    preprocessing: Preprocessing,
    state: nnx.State,
    images: Num[Array, "batch height width channels"],
    task: str = Outputs.task,
) -> Float[Array, "batch *places classes"]:
    """Probabilities of classes or labels; of a regression its outputs as they are."""
    with jax.default_matmul_precision("highest"):  # the published logits are those of float32 products
        logits = nnx.merge(graph, state)(normalise(images, preprocessing))
    return TASKS[task].activated(logits)
