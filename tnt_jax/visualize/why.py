"""Explanations: the share of each word in a class, by several methods, for one class or two side by side."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Float

from tnt_jax.config import InputError
from tnt_jax.data.decode import ImageSource
from tnt_jax.evaluation.attribution import METHODS, Size, attribute
from tnt_jax.inference import probabilities
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import description_of
from tnt_jax.storage.files import write_whole
from tnt_jax.tasks.table import TASKS
from tnt_jax.visualize.canvas import (
    PANEL,
    TITLE_WIDTH,
    Preprocessed,
    colour_bar,
    new_figure,
    panels,
    preprocess,
    show_image,
    show_map,
)

SIGNED = "PuOr_r"  # of two colours with white at 0, told apart by the colour-blind


@dataclasses.dataclass(frozen=True)
class Explanation:
    """An explanation of one class of an image."""

    image: Preprocessed
    title: str
    """The class and its probability; of a regression the target and its value."""
    maps: list[Float[np.ndarray, "rows columns"]]
    """One for each method."""


def why(
    model: Model,
    images: ImageSource | Sequence[ImageSource],
    *,
    classes: Sequence[str | int] = (),
    methods: Sequence[str] = ("rollout",),
    size: Size = "words",
    **options,
):
    """A matplotlib figure: for every image a row for each class, with a map of each method.

    Args:
        classes: names or numbers, of a regression of its targets; by default what is predicted.
        methods: of `tnt_jax.attribution.METHODS`.
        size: of a place, "sentences", "words" or "pixels"; of a method that does not have it, its finest.
        options: of a method, such as `block` of grad-cam.

    Raises:
        InputError: an unknown class or method, an option that no method has, or an image that cannot be read.
    """
    images = list(images) if isinstance(images, list | tuple) else [images]
    explanations = explained_images(model, images, classes=classes, methods=methods, size=size, **options)
    return draw_explanations(explanations, methods)


def explained_images(
    model: Model,
    images: Sequence[ImageSource],
    *,
    classes: Sequence[str | int],
    methods: Sequence[str],
    size: Size,
    **options,
) -> list[Explanation]:
    """For every image each class in turn. Arguments and errors are those of `why`."""
    if unknown := [method for method in methods if method not in METHODS]:
        raise InputError(f"there is no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    if unused := [name for name in options if not any(name in METHODS[each].options for each in methods)]:
        raise InputError(f"{unused[0]} was given, and {', '.join(methods)} has no use for it")
    if not images:
        raise InputError("no image was given")
    config = model.config
    if not config.num_classes:
        raise InputError(f"{config.name} was made with num_classes=0: it has features, and no classes")
    description = description_of(model)
    labels = [find_class(each, description.class_names, config.num_classes) for each in classes]
    explanations = []
    for image in [preprocess(model, image) for image in images]:
        predicted, titles = _predicted(model, image)
        for label in labels or predicted:
            maps = []
            for method in methods:
                at = size if size in METHODS[method].sizes else METHODS[method].sizes[-1]
                own = {name: value for name, value in options.items() if name in METHODS[method].options}
                maps.append(attribute(model, image.batch, [label], method, size=at, **own)[0])
            explanations.append(Explanation(image, titles[label], maps))
    return explanations


def _predicted(model: Model, image: Preprocessed) -> tuple[list[int], list[str]]:
    """The predictions, as numbers: the class, the labels or, where there is none, the likeliest, or all targets; and
    a title for each that could be."""
    description, (graph, state) = description_of(model), nnx.split(model)
    outputs = description.outputs
    scores = probabilities(graph, description.preprocessing, state, image.pixels[None], outputs.task)
    return TASKS[outputs.task].reasons(np.asarray(scores)[0], outputs, description.class_names)


def draw_explanations(explanations: Sequence[Explanation], methods: Sequence[str]):
    """The figure of `why`."""
    columns = 1 + len(methods)
    figure = new_figure(max(TITLE_WIDTH, (PANEL + 0.55) * columns), (PANEL + 0.35) * len(explanations))
    parts = figure.subfigures(len(explanations), squeeze=False)[:, 0]
    for part, each in zip(parts, explanations, strict=True):
        image, *maps = panels(part, columns, columns)
        show_image(image, each.image.pixels, each.title)
        for axes, method, values in zip(maps, methods, each.maps, strict=True):
            _draw_map(part, axes, values, each.image.pixels, METHODS[method].title)
    return figure


def write_maps(explanations: Sequence[Explanation], path: str | os.PathLike) -> None:
    """The maps as float32 (images and classes, methods, rows, columns).

    Raises:
        InputError: the methods have maps of different sizes.
    """
    shapes = {values.shape for each in explanations for values in each.maps}
    if len(shapes) > 1:
        raise InputError(
            f"maps of {' and '.join(map(str, sorted(shapes)))} do not fit into one array; take --size words"
        )
    maps = np.stack([np.stack(each.maps) for each in explanations])

    def write(unfinished: Path) -> None:
        with open(unfinished, "wb") as file:
            np.save(file, maps)

    write_whole(path, write)


def find_class(wanted: str | int, names: Sequence[str] | None, count: int) -> int:
    """The number of a class that is given by its name or its number.

    Raises:
        InputError: there is no such class; the message has the nearest names.
    """
    if names and str(wanted) in names:
        return list(names).index(str(wanted))
    if str(wanted).isdecimal() and int(wanted) < count:
        return int(wanted)
    folded = {name.casefold(): name for name in names or ()}
    near = [folded[each] for each in difflib.get_close_matches(str(wanted).casefold(), folded, n=3, cutoff=0.5)]
    known = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {count}, counted from 0"
    raise InputError(f"the model has no class {wanted!r}; {known}")


def _draw_map(part, axes, values: Float[np.ndarray, "rows columns"], pixels: np.ndarray, title: str) -> None:
    """A map with its colour bar: shares of the whole, or, where places also speak against the class, of the logit."""
    most = max(float(np.abs(values).max()), 1e-30)
    if values.min() < 0:
        drawn = show_map(axes, values, pixels, title, colours=SIGNED, limits=(-most, most))
        colour_bar(part, drawn, axes, "logit, for and against")
        return
    whole = max(float(values.sum()), 1e-30)
    drawn = show_map(axes, 100 * values / whole, pixels, title, limits=(0, 100 * most / whole))
    colour_bar(part, drawn, axes, "% of the whole")
