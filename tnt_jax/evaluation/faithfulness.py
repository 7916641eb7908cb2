"""Faithfulness of explanations: what happens to a class when the places that a map names are taken away or put in."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.sources import Split
from tnt_jax.evaluation.attribution import METHODS, Size, shape_of
from tnt_jax.evaluation.evaluate import match_of, models_in, open_test, over_images, test_data
from tnt_jax.models.variants import Model, with_formulation
from tnt_jax.storage.description import description_of
from tnt_jax.tasks.metrics import Z95
from tnt_jax.tasks.table import check_one_class

STEPS = 16
RANDOM = "random order"  # the baseline: a map that knows nothing


def deletion_and_insertion(
    model: Model,
    images: Float[Array, "batch height width channels"],
    classes: Int[Array, " batch"],
    maps: Float[Array, "batch rows columns"],
    *,
    steps: int = STEPS,
) -> tuple[Float[Array, "batch points"], Float[Array, "batch points"]]:
    """The probability of the class while places go, the highest of the map first, and while they come.

    What is deleted becomes the mean colour, which is 0 once normalised; what is inserted stands in a blurred image, in
    which every patch has one colour that runs into its neighbours'. A faithful map loses the class early (a small area
    under the first curve) and gains it early (a large one under the second).
    Source: Petsiuk et al., arXiv 1806.07421, algorithm 1.

    Args:
        images: normalised.

    Returns:
        Both curves, at 0, 1 / steps, ..., 1 of the places.
    """
    batch, height, width, channels = images.shape
    rows, columns = maps.shape[1:]
    # The rank of each place: 0 is the highest. Equal ones go in their order.
    ranks = jnp.argsort(jnp.argsort(-maps.reshape(batch, -1), axis=1), axis=1).reshape(maps.shape)
    ranks = ranks[:, np.arange(height) * rows // height][:, :, np.arange(width) * columns // width, None]
    patch = model.config.patch_size
    small = jax.image.resize(images, (batch, height // patch, width // patch, channels), "linear", antialias=True)
    blurred = jax.image.resize(small, images.shape, "linear")

    def probabilities(count: Array) -> tuple[Array, Array]:
        named = ranks < count

        def of_class(images: Array) -> Array:
            chances = jax.nn.softmax(model(images).astype(jnp.float32))
            return jnp.take_along_axis(chances, classes[:, None], axis=1)[:, 0]

        return of_class(jnp.where(named, 0.0, images)), of_class(jnp.where(named, images, blurred))

    counts = jnp.round(jnp.arange(steps + 1) / steps * rows * columns)
    deleted, inserted = jax.lax.map(probabilities, counts)
    return deleted.T, inserted.T


def area_under(curves: Float[Array, "batch points"]) -> Float[Array, " batch"]:
    """The area under each curve over the share of the places, by the trapezoidal rule: from 0 to 1."""
    return (curves[:, :-1] + curves[:, 1:]).mean(axis=1) / 2


def explain_model(
    path: str,
    sources: Sequence[str] = (),
    *,
    methods: Sequence[str],
    size: Size = "words",
    count: int | None = None,
    batch_size: int = 16,
) -> Iterator[dict]:
    """The faithfulness of methods to a model: areas of deletion and insertion, means over test images, a row for each.

    What is explained is the predicted class. A last row has places in random order.

    Raises:
        InputError: the model has another task, or its classes are not those of the source; an unknown method, or one
            that has no map of this size.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
        if size not in METHODS[method].sizes:
            raise InputError(f"{method} has no map of {size}; it has {' and '.join(METHODS[method].sizes)}")
    model, tests = _opened(path, sources, count)
    return _explained(path, with_formulation(model, "reference", dtype="float32"), tests, methods, size, batch_size)


def _explained(
    path: str, model: Model, tests: list, methods: Sequence[str], size: Size, batch_size: int
) -> Iterator[dict]:
    for data, images in tests:
        for method in (*methods, RANDOM):
            maps_of = _random_maps if method == RANDOM else METHODS[method].compute

            def compute(model: Model, inputs: jax.Array, labels: jax.Array, maps_of=maps_of):
                classes = model(inputs).argmax(axis=-1)
                maps = maps_of(model, inputs, classes, size)
                return [area_under(each) for each in deletion_and_insertion(model, inputs, classes, maps)]

            (areas,), _ = over_images(images, data, [model], batch_size, compute)
            row = {"model": path, "data": data.source, "split": images.name}
            row |= {"method": METHODS[method].title if method in METHODS else method, "size": size}
            row["images"] = len(areas[0])
            for name, values in zip(("deletion", "insertion"), areas, strict=True):
                mean, half = float(values.mean()), Z95 * float(values.std()) / len(values) ** 0.5
                row |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
            yield row


def _random_maps(model: Model, inputs: jax.Array, classes: jax.Array, size: Size) -> jax.Array:
    """Noise in the place of a map."""
    return jax.random.uniform(jax.random.key(0), (len(inputs), *shape_of(model, size)))


def _opened(path: str, sources: Sequence[str], count: int | None) -> tuple[Model, list[tuple[DataConfig, Split]]]:
    """A model of classes (of a run the averaged weights), and up to `count` test images of each source, evenly spread.

    Raises:
        InputError: the model has another task, or its classes are not those of the source.
    """
    _, model = next(models_in(path))
    outputs = description_of(model).outputs
    check_one_class(outputs.task, path, "--explain")
    if count is not None and count < 1:
        raise InputError(f"--images is {count}, and must be at least 1")
    tests = []
    for data in test_data(path, sources, outputs.task):
        images = open_test(data)
        match_of(model, images, data)
        if count is not None and count < len(images):
            images = images.take(np.linspace(0, len(images) - 1, count).astype(int))
        tests.append((data, images))
    return model, tests
