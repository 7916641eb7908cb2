"""A model under attack, and how faithful explanations of it are, over the test images of a source."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.sources import Source, Subset
from tnt_jax.evaluation.attacks import Attack, adversarial
from tnt_jax.evaluation.attribution import METHODS, Size, shape_of
from tnt_jax.evaluation.evaluate import match_of, models_in, open_test, over_images, test_data
from tnt_jax.evaluation.faithfulness import area, deletion_and_insertion
from tnt_jax.evaluation.scores import Z95, wilson
from tnt_jax.models.variants import Model, with_formulation
from tnt_jax.storage.description import description_of
from tnt_jax.storage.files import write_whole

RANDOM = "random order"
"""The row that tells what a map is worth that knows nothing."""


def opened(
    path: str, sources: Sequence[str], count: int | None, what: str
) -> tuple[Model, list[tuple[DataConfig, Source]]]:
    """A model of classes (of a run the averaged weights), and up to `count` test images of each source, evenly spread.

    Raises:
        InputError: the model has another task, or its classes are not those of the source.
    """
    _, model = next(models_in(path))
    outputs = description_of(model).outputs
    if outputs.task != "single_label":
        raise InputError(f"the task of {path} is {outputs.task}, and {what} asks for classes: it needs single_label")
    if count is not None and count < 1:
        raise InputError(f"--images is {count}, and must be at least 1")
    tests = []
    for data in test_data(path, sources, outputs.task):
        images = open_test(data)
        match_of(model, images, data)
        if images[0][0].dtype != np.uint8:
            raise InputError(f"{data.source} has pixels of {images[0][0].dtype}, and {what} is defined for 8 bits")
        if count is not None and count < len(images):
            images = Subset(images, np.linspace(0, len(images) - 1, count).astype(int))
        tests.append((data, images))
    return model, tests


def attack_model(
    path: str,
    sources: Sequence[str] = (),
    *,
    attack: Attack,
    epsilon: float,
    steps: int,
    count: int | None = None,
    out: str | None = None,
    batch_size: int = 64,
) -> Iterator[dict]:
    """Accuracy on test images, and on images within `epsilon` of them that an attack has made; a row for each source.

    Args:
        out: a folder that the attacked images are written to, as `folder:` reads them: a folder for each class.

    Raises:
        InputError: as `opened`; the folder exists; or steps is not positive.
    """
    if steps < 1:
        raise InputError(f"--steps is {steps}, and must be at least 1")
    model, tests = opened(path, sources, count, "--attack")
    if out is not None:
        if len(tests) > 1:
            raise InputError(f"--attack-out takes the images of one source, and {len(tests)} were given")
        if Path(out).exists():
            raise InputError(f"{out} exists; choose another folder for the attacked images")
    return _attacked(path, model, tests, attack, epsilon, steps, out, batch_size)


def _attacked(
    path: str, model: Model, tests: list, attack: Attack, epsilon: float, steps: int, out: str | None, batch_size: int
) -> Iterator[dict]:
    preprocessing = description_of(model).preprocessing
    mean, std = (np.array(each, np.float32) for each in (preprocessing.mean, preprocessing.std))
    for data, images in tests:
        chosen = match_of(model, images, data).of_model

        def compute(model: Model, inputs: jax.Array, labels: jax.Array, chosen=chosen):
            def of_source(inputs: jax.Array) -> jax.Array:
                return model(inputs)[:, chosen]

            pixels = jnp.round((inputs * std + mean) * 255)
            options = {"attack": attack, "epsilon": epsilon, "steps": steps, "key": jax.random.key(0)}
            changed = adversarial(of_source, pixels, labels, preprocessing, **options)
            normalised = (changed / 255 - mean) / std
            predictions = [of_source(each).argmax(axis=-1) for each in (inputs, normalised)]
            return labels, *predictions, changed.astype(jnp.uint8)

        ((labels, clean, attacked, changed),), _ = over_images(images, data, [model], batch_size, compute)
        if out is not None:
            _write_images(out, changed, labels, images.class_names)
        row = {"model": path, "data": data.source, "method": attack, "epsilon": f"{255 * epsilon:g}/255"}
        row |= {"steps": str(steps if attack == "pgd" else 1), "images": len(labels)}
        for name, predictions in (("top1", clean), ("attacked_top1", attacked)):
            right = int((predictions == labels).sum())
            low, high = wilson(right, len(labels))
            row |= {name: right / len(labels), f"{name}_low": low, f"{name}_high": high}
        yield row


def _write_images(folder: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    def write(unfinished: Path) -> None:
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            of_class = unfinished / "test" / class_names[label]
            of_class.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(of_class / f"{index:06}.png")

    write_whole(folder, write)


def explain_model(
    path: str,
    sources: Sequence[str] = (),
    *,
    methods: Sequence[str],
    size: Size = "words",
    count: int | None = None,
    batch_size: int = 16,
) -> Iterator[dict]:
    """How faithful methods are to a model: the areas of deletion and insertion, means over test images, a row for each.

    What is explained is the predicted class. A last row has places in random order.

    Raises:
        InputError: as `opened`; an unknown method; or a method that has no map of this size.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
        if size not in METHODS[method].sizes:
            raise InputError(f"{method} has no map of {size}; it has {' and '.join(METHODS[method].sizes)}")
    model, tests = opened(path, sources, count, "--explain")
    return _explained(path, with_formulation(model, "reference", dtype="float32"), tests, methods, size, batch_size)


def _explained(
    path: str, model: Model, tests: list, methods: Sequence[str], size: Size, batch_size: int
) -> Iterator[dict]:
    for data, images in tests:
        for method in (*methods, RANDOM):
            maps_of = random_maps if method == RANDOM else METHODS[method].compute

            def compute(model: Model, inputs: jax.Array, labels: jax.Array, maps_of=maps_of):
                classes = model(inputs).argmax(axis=-1)
                maps = maps_of(model, inputs, classes, size)
                return [area(each) for each in deletion_and_insertion(model, inputs, classes, maps)]

            (areas,), _ = over_images(images, data, [model], batch_size, compute)
            row = {"model": path, "data": data.source, "method": METHODS[method].title if method in METHODS else method}
            row |= {"size": size, "images": len(areas[0])}
            for name, values in zip(("deletion", "insertion"), areas, strict=True):
                mean, half = float(values.mean()), Z95 * float(values.std()) / len(values) ** 0.5
                row |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
            yield row


def random_maps(model: Model, inputs: jax.Array, classes: jax.Array, size: Size) -> jax.Array:
    """Noise in the place of a map."""
    return jax.random.uniform(jax.random.key(0), (len(inputs), *shape_of(model, size)))
