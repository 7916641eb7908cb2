"""Every image of a source exactly once: the predictions of a finished model, and its features."""

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.classes import Match, match_classes
from tnt_jax.data.decode import Reading
from tnt_jax.data.imagenet import RELATIVES, open_imagenet, real_labels
from tnt_jax.data.mixing import normalise
from tnt_jax.data.opening import open_reported, open_split, without_unused
from tnt_jax.data.pipeline import eval_batches
from tnt_jax.data.sources import Split
from tnt_jax.evaluation.probes import NEIGHBOURS, linear_probe, nearest_neighbours
from tnt_jax.evaluation.published import published
from tnt_jax.models.adapting import adapt
from tnt_jax.models.variants import Model, with_changes
from tnt_jax.storage.description import description_of
from tnt_jax.storage.folder import model_from_parameters, model_parameters
from tnt_jax.storage.load import load_model
from tnt_jax.storage.run import is_run, read_config
from tnt_jax.tasks.metrics import wilson
from tnt_jax.tasks.table import TASKS, check_one_class
from tnt_jax.tasks.task import Predictions
from tnt_jax.training.mesh import make_mesh, on_mesh, replicated, to_devices

_log = logging.getLogger(__name__)


class NonFinitePredictionsError(RuntimeError):
    """A model gives infinite numbers or NaN."""

    exit_code = 1


def over_images(
    images: Split, data: DataConfig, models: Sequence[Model], batch_size: int, compute: Callable
) -> tuple[list[list], float]:
    """The results of `compute(model, inputs, labels)` for every image once, and images per second.

    Parameters are copied to all devices, and the images of a batch are divided among them.

    Args:
        models: of the same sizes and preprocessing. Each image is decoded once for all of them.
        batch_size: images that are computed together, rounded up to a multiple of the devices.

    Returns:
        For each model its arrays, joined over all images.

    Raises:
        NonFinitePredictionsError: a model gives infinite numbers or NaN.
    """
    config, preprocessing = models[0].config, description_of(models[0]).preprocessing
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, and must be at least 1")
    mesh = make_mesh()
    graphdef = nnx.split(models[0])[0]
    # The model of a run lies on one device, wherever it was trained.
    params = [jax.device_put(nnx.split(model)[1], replicated(mesh)) for model in models]

    def compute_batch(params: list, batch: dict):
        inputs = normalise(batch["image"], preprocessing)
        return [compute(nnx.merge(graphdef, each), inputs, batch["label"]) for each in params]

    step = jax.jit(on_mesh(mesh, compute_batch))
    parts, started = [], None
    batches = eval_batches(
        images,
        dataclasses.replace(data, crop=preprocessing.crop),
        image_size=config.image_size,
        channels=config.in_channels,
        batch_size=-(-batch_size // mesh.devices.size) * mesh.devices.size,
        interpolation=preprocessing.interpolation,
    )
    for batch in batches:
        computed = step(params, to_devices(batch, mesh))
        parts.append([[np.asarray(part)[batch["mask"]] for part in each] for each in computed])
        if not all(np.isfinite(part).all() for each in parts[-1] for part in each):
            raise NonFinitePredictionsError(
                f"the model gives numbers that are not finite for images of {data.source}: it has no accuracy"
            )
        started = started or time.perf_counter()  # after the first batch, which was compiled
    rest = sum(len(part[0][0]) for part in parts[1:])
    rate = rest / (time.perf_counter() - started) if rest else math.nan
    return [[np.concatenate(part) for part in zip(*each, strict=True)] for each in zip(*parts, strict=True)], rate


@dataclasses.dataclass(frozen=True)
class View:
    """A view of images in evaluation, where it is not the one of training."""

    image_size: tuple[int, int] | None = None
    """Height and width; positions are resized to it."""
    crop: float | None = None
    """Share of the shorter side that is kept, above 0 and at most 1."""
    tta: Literal["flip"] | None = None
    """flip: the mean of the outputs for an image and for its mirror image."""

    def of(self, model: Model) -> Model:
        """The model that is shown images so. Raises InputError if it cannot be."""
        if self.crop is not None and not 0 < self.crop <= 1:
            raise InputError(f"crop is {self.crop:g}, and must be above 0 and at most 1")
        described, wanted = description_of(model), model.config
        if self.crop is not None and TASKS[described.outputs.task].dense:
            raise InputError(f"crop is {self.crop:g}, and a model of task {described.outputs.task} sees images whole")
        if self.image_size and self.image_size != wanted.image_size:
            wanted = with_changes(wanted, {"image_size": self.image_size})
            parameters, _ = adapt(model_parameters(model), model.config, wanted)
            model = model_from_parameters(wanted, parameters)
        shown = described.preprocessing.adapted(wanted)
        shown = dataclasses.replace(shown, crop=self.crop or shown.crop)
        model.description = dataclasses.replace(described, config=wanted, preprocessing=shown)
        return model

    @property
    def text(self) -> str:
        """For the name of the weights."""
        size = f", {self.image_size[0]}x{self.image_size[1]}" if self.image_size else ""
        return size + (f", crop {self.crop:g}" if self.crop else "") + (f", {self.tta}" if self.tta else "")


AS_TRAINED = View()


def predictions_of(
    models: Sequence[Model],
    images: Split,
    data: DataConfig,
    *,
    batch_size: int = 64,
    tta: Literal["flip"] | None = None,
) -> list[Predictions]:
    """The predictions of each model for every image of a source, in its order, in the classes of the source.

    Classes, labels and targets are matched by name: another order is mapped, and of more classes only those of the
    source are looked at, as of a relative of ImageNet those that it has. Either is said.

    Args:
        models: of the same sizes, classes and task, such as the averaged and the raw weights of a run.
        tta: as `View.tta`.

    Raises:
        InputError: the source has classes that the models do not have, or it is of another task, or an image cannot be
            read.
        NonFinitePredictionsError: a model gives infinite numbers or NaN.
    """
    outputs, match = description_of(models[0]).outputs, _match_told(models[0], images, data)
    task = TASKS[outputs.task]
    asked = np.zeros(len(images.class_names), bool)
    asked[slice(None) if images.classes is None else images.classes] = True

    def compute(model: Model, inputs: jax.Array, labels: jax.Array):
        logits = model(inputs).astype(jnp.float32)
        if tta == "flip":
            logits = (logits + task.mirrored(model(inputs[:, :, ::-1])).astype(jnp.float32)) / 2
        return task.of_each_image(task.in_classes(logits, match.of_model), labels, asked)

    found, rate = over_images(images, data, models, batch_size, compute)
    return [task.predictions(arrays, outputs, match.of_model, rate) for arrays in found]


def outputs_of(
    models: Sequence[Model], images: Split, data: DataConfig, *, batch_size: int = 64
) -> tuple[np.ndarray, list[np.ndarray], float]:
    """Labels of all images, the outputs of each model in the order of the source's classes, and images per second.

    The labels are int (images,) or float32 (images, outputs), the outputs float32 (images, outputs): logits, or the
    standardised values of a regression.

    Raises:
        InputError, NonFinitePredictionsError: as `predictions_of`.
    """
    match = _match_told(models[0], images, data)

    def compute(model: Model, inputs: jax.Array, labels: jax.Array):
        return labels, model(inputs).astype(jnp.float32)[:, match.of_model]

    found, rate = over_images(images, data, models, batch_size, compute)
    return found[0][0], [outputs for _, outputs in found], rate


def _match_told(model: Model, images: Split, data: DataConfig) -> Match:
    match = match_of(model, images, data)
    if match.note:
        _log.warning(match.note)
    return match


def match_of(model: Model, images: Split, data: DataConfig) -> Match:
    """The classes of a source among those of a model. Raises InputError if the model does not have them."""
    described = description_of(model)
    if described.outputs.task != data.task:
        raise InputError(f"the model's task is {described.outputs.task}, and {data.source} is read as {data.task}")
    try:
        return match_classes(described.class_names, described.config.num_classes, images.class_names, data.source)
    except InputError as error:
        raise InputError(f"{error}; its features can be probed with any data: --probe knn linear") from error


def features_of(
    model: Model, images: Split, data: DataConfig, *, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The features before a model's head of every image of a source, float32 (images, dim), and the classes, (images,).

    That is TNT's class token, or the mean of PyramidTNT's sentences, after the last norm.
    """

    def compute(model: Model, inputs: jax.Array, labels: jax.Array):
        return model.extract_feat(inputs)[0].astype(jnp.float32), labels

    ((features, labels),), _ = over_images(images, data, [model], batch_size, compute)
    return features, labels


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A set of weights on a dataset."""

    model: str
    weights: str
    data: str
    split: str
    images: Split
    predictions: Predictions
    published: dict[str, float]
    """top1 and top5 as others published them, where they did."""


def evaluate_model(
    path: str,
    sources: Sequence[str] = (),
    *,
    split: str | None = None,
    real_labels_file: str | None = None,
    batch_size: int = 64,
    dtype: Literal["float32", "bfloat16"] | None = None,
    view: View = AS_TRAINED,
) -> Iterator[Evaluation]:
    """Evaluates what lies in a folder: the averaged and the raw weights of a training run, or the one set of a model.

    All is opened at once, and computed when it is asked for.

    Args:
        sources: as in `DataConfig.source`, or a relative of ImageNet as `open_imagenet` takes it; none takes the data
            of the training run.
        split: what is evaluated, such as "train" or "validation"; by default the test images, and where there are none
            those that training evaluated.
        real_labels_file: ReaL's labels; each `imagenet:` source is then scored with them too.
        dtype: what is computed in; by default what the model was trained or published in.
        view: how the images are shown. What others published is of images as the model was trained.

    Raises:
        InputError: there is no such model, no source is known, or its classes are not those of the model.
    """
    names, models = zip(*((name + view.text, view.of(model)) for name, model in models_in(path, dtype)), strict=True)
    task = description_of(models[0]).outputs.task
    white = description_of(models[0]).preprocessing.white
    wanted = [dataclasses.replace(data, white=data.white or white) for data in test_data(path, sources, task)]
    opened = [(data, open_test(data, split)) for data in wanted]
    if real_labels_file and not any(data.source.startswith("imagenet:") for data, _ in opened):
        raise InputError(f"{real_labels_file} is for the source imagenet:PATH, and that was not given")
    accepted = {
        data.source: real_labels(real_labels_file, list(images.files))
        for data, images in opened
        if real_labels_file and data.source.startswith("imagenet:")
    }
    for data, images in opened:
        match_of(models[0], images, data)

    def evaluations() -> Iterator[Evaluation]:
        for data, images in opened:
            kind, name = _kind(data.source), images.name
            # What others published is of all classes.
            whole = images.classes is None or len(images.classes) == RELATIVES[kind]
            whole = whole and view == AS_TRAINED
            known = published(models[0].config, kind) if whole else {}
            for weights, predictions in zip(
                names, predictions_of(models, images, data, batch_size=batch_size, tta=view.tta), strict=True
            ):
                yield Evaluation(path, weights, data.source, name, images, predictions, known)
                if data.source in accepted:
                    judged = predictions.rescored(accepted[data.source])
                    known_real = published(models[0].config, "imagenet-real") if whole else {}
                    yield Evaluation(path, weights, f"{data.source} (ReaL)", name, images, judged, known_real)

    return evaluations()


def _kind(source: str) -> str:
    """The published numbers that belong to a source: of ImageNet-1k's relatives, of itself, or none."""
    name = source.partition(":")[0]
    # As a whole word: imagenet2012_corrupted is another dataset.
    is_imagenet = name not in RELATIVES and re.search(r"[:/]imagenet2012(?![\w-])", source)
    return "imagenet" if is_imagenet else name


HOW_TO_READ = ("image_column", "label_columns", "label_separator", "encoding", "depth", "white", "max_pixels")


def test_data(path: str, sources: Sequence[str], task: str) -> list[DataConfig]:
    """The data that a model of a task is evaluated on: what was given, or that of the training run.

    What was given is read as the training run read its own.
    """
    run = read_config(path).data if is_run(path) else None
    if run is None and not sources:
        raise InputError(f"{path} is not a training run, so --source must say what to evaluate it on")
    reading = {name: getattr(run, name) for name in HOW_TO_READ} if run else {}
    return [without_unused(DataConfig(source, task=task, **reading)) for source in sources] or [run]


def open_test(data: DataConfig, split: str | None = None) -> Split:
    """The images that are reported, or those of a split; those of ImageNet's relatives have no other split."""
    if data.source.partition(":")[0] in RELATIVES:
        return open_imagenet(data.source, Reading.of(data))
    return open_split(data, split) if split else open_reported(data)


def models_in(path: str, dtype: Literal["float32", "bfloat16"] | None = None) -> Iterator[tuple[str, Model]]:
    """Each set of weights by its name, with the model that has it: of a training run the averaged and the raw ones."""
    suffix = f", {dtype}" if dtype else ""
    if not is_run(path):
        yield f"as loaded{suffix}", load_model(path, dtype=dtype)
        return
    yield f"averaged{suffix}", load_model(path, weights="ema", dtype=dtype)
    yield f"raw{suffix}", load_model(path, weights="raw", dtype=dtype)


def probe_model(
    path: str, sources: Sequence[str], methods: Sequence[Literal["knn", "linear"]], *, batch_size: int = 64
) -> Iterator[dict]:
    """Accuracy of classifiers on a model's frozen features: fitted to a source's training images, scored on its tests.

    The classes need not be those that the model was trained for; of a run, the averaged weights are taken.

    All is opened at once, and computed when it is asked for.

    Returns:
        model, data, method, training_images, images, top1 with the ends of its 95% interval.

    Raises:
        InputError: as `evaluate_model`; or a source has no training images, or only one class.
    """
    _, model = next(models_in(path))
    task = description_of(model).outputs.task
    check_one_class(task, path, "--probe")
    wanted = test_data(path, sources, task)
    for data in wanted:
        if data.source.partition(":")[0] in RELATIVES:
            raise InputError(f"{data.source} has no training images, to which a probe is fitted; folder:PATH has both")
    opened = []
    for data in wanted:
        train = open_split(data, data.train_split)
        if "linear" in methods and len(train.class_names) < 2:
            raise InputError(f"{data.source} has {len(train.class_names)} class, and a linear probe needs two at least")
        opened.append((data, train, open_reported(data)))
    return _probes(path, model, opened, methods, batch_size)


def _probes(path: str, model: Model, opened: list, methods: Sequence[str], batch_size: int) -> Iterator[dict]:
    for data, train, test in opened:
        train_features, train_labels = features_of(model, train, data, batch_size=batch_size)
        test_features, labels = features_of(model, test, data, batch_size=batch_size)
        for method in methods:
            if method == "knn":
                classes = len(train.class_names)
                found = nearest_neighbours(train_features, train_labels, test_features, classes=classes)
            else:
                found = linear_probe(train_features, train_labels, test_features)
            right = int((found == labels).sum())
            low, high = wilson(right, len(labels))
            yield {
                "model": path,
                "data": data.source,
                "split": test.name,
                "method": {"knn": f"{NEIGHBOURS} nearest neighbours", "linear": "linear probe"}[method],
                "training_images": len(train_labels),
                "images": len(labels),
                "top1": right / len(labels),
                "top1_low": low,
                "top1_high": high,
            }
