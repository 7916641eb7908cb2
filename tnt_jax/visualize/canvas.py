"""Shared by pictures: an image as the model sees it, figures with a part for each image, maps over an image."""

import dataclasses
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from tnt_jax.config import InputError
from tnt_jax.data.crop import evaluated
from tnt_jax.data.decode import ImageSource
from tnt_jax.data.mixing import normalise
from tnt_jax.data.samples import visible
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import description_of

log = logging.getLogger(__name__)
MAP = "viridis"  # rises evenly in lightness: it holds in grey print and for the colour-blind
MARK = "#ff2a2a"  # the paper's red
LEAST_GREY, ALPHA = 170, 0.7
"""The grey of black in the image under a map, and the opacity of the map. A bar stands over the grey between."""
MEAN_GREY = str((LEAST_GREY + 255) / 2 / 255)
PANEL = 1.7  # inches
TITLE_WIDTH = 4.8  # inches: no narrower, or the title is cut off


@dataclasses.dataclass(frozen=True)
class Preprocessed:
    """An image as the model sees it."""

    pixels: Num[np.ndarray, "height width channels"]
    """Cut as evaluation cuts."""
    batch: Float[Array, "1 height width channels"]
    """Normalised: what the model is called with."""


def preprocess(model: Model, image: ImageSource) -> Preprocessed:
    """Raises InputError where the image cannot be read."""
    preprocessing, channels = description_of(model).preprocessing, model.config.in_channels
    pixels = evaluated(image, channels, preprocessing)
    return Preprocessed(pixels, normalise(jnp.asarray(pixels)[None], preprocessing))


def new_figure(width: float, height: float):
    """A figure of so many inches that belongs to no window, laid out so that nothing is cut off.

    Its texts are names and numbers: `$10-$20` is no formula, and letters that the usual font lacks are looked for in
    the other fonts of this machine.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    class FigureOfNames(Figure):
        __module__ = Figure.__module__  # by which Gradio knows that a figure is matplotlib's

        def draw(self, renderer) -> None:
            texts = [text for text in self.findobj(Text) if "\\mathdefault" not in text.get_text()]
            families = _families("".join(sorted({letter for text in texts for letter in text.get_text()})))
            for text in texts:
                text.set_parse_math(False)
                text.set_fontfamily(families)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from font")  # said by `_families`
                super().draw(renderer)

    return FigureOfNames(figsize=(width, height), layout="constrained", dpi=120)


@functools.cache
def _families(letters: str) -> list[str]:
    """The usual font, and where it lacks some letters another of this machine that has them, if there is one."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    properties = FontProperties()
    usual, known = properties.get_family(), set(get_font(findfont(properties)).get_charmap())
    lacking = {ord(letter) for letter in letters if letter.isprintable()} - known
    if not lacking:
        return usual
    for font in fontManager.ttflist:
        if lacking <= set(get_font(font.fname).get_charmap()):
            return [*usual, font.name]
    log.warning(
        "no font of this machine has the letters %s: boxes stand for them; install one that has, such as Debian's "
        "fonts-noto-cjk", "".join(map(chr, sorted(lacking)))[:20],
    )  # fmt: skip
    return usual


MAX_NAME = 32


def shorten(name: str, most: int = MAX_NAME) -> str:
    """A name as it fits beside a picture: of a long one its beginning and its end."""
    return name if len(name) <= most else f"{name[: most // 2]}...{name[-most // 2 + 3 :]}"


def per_image(
    model: Model,
    images: ImageSource | Sequence[ImageSource],
    size: tuple[float, float],
    draw: Callable[[Any, Preprocessed], None],
):
    """A figure with one part of `size` (inches) for each image, one below the other, in which `draw` draws it.

    Raises:
        InputError: an image cannot be read, or there is none.
    """
    images = list(images) if isinstance(images, list | tuple) else [images]
    if not images:
        raise InputError("no image was given")
    all_seen = [preprocess(model, image) for image in images]
    figure = new_figure(max(size[0], TITLE_WIDTH), size[1] * len(images))
    parts = figure.subfigures(len(images), squeeze=False)[:, 0]
    for part, seen in zip(parts, all_seen, strict=True):
        draw(part, seen)
    return figure


def panels(part, count: int, columns: int) -> list:
    """`count` axes without ticks in rows of `columns`; what is left of the last row is empty."""
    axes = part.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for each in axes:
        each.set_xticks([])
        each.set_yticks([])
    for each in axes[count:]:
        each.set_visible(False)
    return list(axes[:count])


def show_image(axes, pixels: np.ndarray, title: str = "") -> None:
    """The image with a pixel's corner at (0, 0), so that patches lie at multiples of their size."""
    height, width, _ = pixels.shape
    axes.imshow(visible(pixels), extent=(0, width, height, 0))
    title_of(axes, title)


def show_map(
    axes,
    values: Float[np.ndarray, "rows columns"],
    pixels: np.ndarray,
    title: str = "",
    *,
    colours: str = MAP,
    limits: tuple[float | None, float | None] = (None, None),
):
    """A map in colours, by default from its least to its greatest value, with the image shining through it, so
    light that a colour means what it means in the bar.

    Returns:
        What `colour_bar` takes.
    """
    height, width = pixels.shape[:2]
    grey = visible(pixels).mean(axis=-1, keepdims=True)
    show_image(axes, (LEAST_GREY + grey * (1 - LEAST_GREY / 255)).astype(np.uint8), title)
    place = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    return axes.imshow(values, cmap=colours, alpha=ALPHA, vmin=limits[0], vmax=limits[1], **place)


def colour_bar(part, drawn, axes, label: str) -> None:
    """The colour bar of a map, beside it or beside several."""
    bar = part.colorbar(drawn, ax=axes, shrink=0.85, aspect=18, pad=0.02)
    bar.ax.set_facecolor(MEAN_GREY)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6)


def bar_of_each(part, axes: list, label: str) -> None:
    """One bar for maps that each run from their own least to their own greatest value."""
    from matplotlib.cm import ScalarMappable

    bar = part.colorbar(ScalarMappable(cmap=MAP), ax=axes, shrink=0.6, aspect=25, pad=0.01, ticks=(0, 1))
    bar.ax.set_facecolor(MEAN_GREY)
    bar.solids.set_alpha(ALPHA)
    bar.ax.set_yticklabels(("least", "most"), fontsize=6)
    bar.set_label(label, fontsize=7)


def title_of(axes, title: str) -> None:
    axes.set_title(title, fontsize=8, pad=3)


def mark_box(axes, row: float, column: float, height: float, width: float) -> None:
    """A red frame around a patch, in pixels."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column, row), width, height, fill=False, edgecolor=MARK, linewidth=1.6))


def check_out(out: str | os.PathLike) -> None:
    """Raises InputError unless a picture can be written as this file, by its ending and its folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(set(FigureCanvasAgg.get_supported_filetypes()) & {"png", "jpg", "pdf", "svg", "webp"})
    path = Path(out)
    if path.suffix[1:].lower() not in known:
        raise InputError(f"--out is {out}, and a picture ends in .{', .'.join(known)}")
    if not path.parent.is_dir():
        raise InputError(f"--out is {out}, and there is no folder {path.parent}")


def chosen_block(wanted: int | None, possible: Iterable[int], what: str) -> int:
    """The index of a block that has what a picture shows: the last of them, or the one that was asked for.

    Raises:
        InputError: it has not.
    """
    possible = list(possible)
    if not possible:
        raise InputError(f"no block of this model has {what}")
    if wanted is None:
        return possible[-1]
    if wanted not in possible:
        raise InputError(f"block {wanted} has no {what}; the blocks with it are {', '.join(map(str, possible))}")
    return wanted
