"""Who attends to whom: words inside a patch, patches over the image, the class token (figures 5 to 7 of the paper).

Each function takes one image or several and returns a matplotlib figure with a part for each.
"""

import math
from collections.abc import Sequence

import numpy as np
from flax import nnx
from jaxtyping import Float

from tnt_jax.config import InputError
from tnt_jax.data.decode import ImageSource
from tnt_jax.models.pyramid_tnt import SPATIAL_REDUCTION, key_grid, stage_grids
from tnt_jax.models.tnt import grid_size
from tnt_jax.models.variants import Model
from tnt_jax.visualize.canvas import (
    MAP,
    MARK,
    PANEL,
    Preprocessed,
    bar_of_each,
    chosen_block,
    colour_bar,
    mark_box,
    panels,
    per_image,
    show_image,
    show_map,
    title_of,
)

Images = ImageSource | Sequence[ImageSource]
Map = Float[np.ndarray, "rows columns"]


@nnx.jit
def _attention_maps(model: Model, batch):
    return model.attention_maps(batch)


def attention_of(model: Model, seen: Preprocessed) -> tuple[list[np.ndarray | None], list[np.ndarray]]:
    """`attention_maps` of one image, without the axis of the batch."""
    inner, outer = _attention_maps(model, seen.batch)
    return [None if weights is None else np.asarray(weights[0]) for weights in inner], [
        np.asarray(weights[0]) for weights in outer
    ]


def outer_grids(model: Model) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
    """Of every block: rows and columns of its sentences and of its keys, and sentences along a side of a key."""
    config = model.config
    if config.architecture != "pyramid":
        return [(grid_size(config), grid_size(config), 1)] * config.depth
    return [
        (grid, key_grid(grid, reduction), reduction)
        for grid, reduction, depth in zip(stage_grids(config), SPATIAL_REDUCTION, config.depth, strict=True)
        for _ in range(depth)
    ]


def check_patch(model: Model, patch: tuple[int, int] | None) -> tuple[int, int]:
    """The patch that was asked for, or the one in the middle.

    Raises:
        InputError: it lies outside the image.
    """
    rows, columns = grid_size(model.config)
    if patch is None:
        return rows // 2, columns // 2
    if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise InputError(
            f"patch {patch[0]} {patch[1]} lies outside the image, which has {rows} rows and {columns} columns of "
            "patches, both counted from 0"
        )
    return tuple(patch)


def outer_map(model: Model, outer: list[np.ndarray], block: int, patch: tuple[int, int]) -> Map:
    """The attention of the sentence over a patch in a block: a share for each place, the mean over the heads.

    A PyramidTNT halves its grid from stage to stage: it is the sentence that covers the patch. Where keys are means
    over squares of sentences, a share is that of a square; sentences at an uneven border that no key has get none.
    """
    grid, keys, reduction = outer_grids(model)[block]
    finest = grid_size(model.config)
    row, column = (place * side // full for place, side, full in zip(patch, grid, finest, strict=True))
    weights = outer[block].mean(axis=0)
    first = model.num_prefix_tokens
    values = weights[first + row * grid[1] + column, first:].reshape(keys)
    if reduction == 1:
        return values
    spread = np.zeros(grid, values.dtype)
    spread[: keys[0] * reduction, : keys[1] * reduction] = values.repeat(reduction, 0).repeat(reduction, 1)
    return spread


def outer_attention(model: Model, images: Images, *, patch: tuple[int, int] | None = None):
    """The attention of one patch over the image, in every block, the mean over the heads (figure 6).

    Args:
        patch: row and column from 0, in patches of `patch_size` pixels; by default the middle one.

    Raises:
        InputError: the patch lies outside the image, or an image cannot be read.
    """
    row, column = check_patch(model, patch)
    size, count = model.config.patch_size, len(outer_grids(model))
    columns = min(5, 1 + count)

    def draw(part, seen: Preprocessed) -> None:
        _, outer = attention_of(model, seen)
        image, *blocks = panels(part, 1 + count, columns)
        show_image(image, seen.pixels, f"patch {row} {column}")
        mark_box(image, row * size, column * size, size, size)
        for block, axes in enumerate(blocks):
            alone = ", one key" if math.prod(outer_grids(model)[block][1]) == 1 else ""
            show_map(axes, outer_map(model, outer, block, (row, column)), seen.pixels, f"block {block}{alone}")
            mark_box(axes, row * size, column * size, size, size)
        bar_of_each(part, blocks, "attention, of each block")
        part.suptitle("Outer attention of the framed patch, mean over heads", fontsize=9)

    return per_image(model, images, (PANEL * columns, PANEL * -(-(1 + count) // columns) + 0.5), draw)


def inner_attention(model: Model, images: Images, *, patch: tuple[int, int] | None = None, block: int | None = None):
    """The attention of each word of a patch inside the patch, the mean over the heads (figure 5).

    The words lie as in the patch; in each one's map a red cross stands at the word itself.

    Args:
        patch: row and column from 0; by default the middle one. In later stages of a PyramidTNT, the sentence over it.
        block: from 0; by default the last with an inner transformer.

    Raises:
        InputError: the patch lies outside the image, the block has no inner transformer, or an image cannot be read.
    """
    row, column = check_patch(model, patch)
    block = chosen_block(block, model.config.inner_blocks, "inner transformer")
    grid, finest = outer_grids(model)[block][0], grid_size(model.config)
    height, width = (full * model.config.patch_size // side for full, side in zip(finest, grid, strict=True))
    row, column = (place * side // full for place, side, full in zip((row, column), grid, finest, strict=True))

    def draw(part, seen: Preprocessed) -> None:
        weights = attention_of(model, seen)[0][block][row, column].mean(axis=0)
        image, close, maps = panels(part, 3, 3)
        show_image(image, seen.pixels, f"patch {row} {column}")
        mark_box(image, row * height, column * width, height, width)
        top, left = row * height, column * width
        show_image(close, seen.pixels[top : top + height, left : left + width], "the patch and its words")
        side = math.isqrt(len(weights))
        for line in range(1, side):
            close.axhline(line * height / side, color="white", linewidth=0.6)
            close.axvline(line * width / side, color="white", linewidth=0.6)
        colour_bar(part, draw_words(maps, weights), maps, "share of a word's attention")
        title_of(maps, f"block {block}: each word's attention")
        part.suptitle("Inner attention, mean over heads; the cross is the word that attends", fontsize=9)

    return per_image(model, images, (8.4, 3.3), draw)


def draw_words(axes, weights: Float[np.ndarray, "words words"]):
    """The map of every word, where the word lies in its patch, with a cross at the word; returns one, for the bar."""
    side = math.isqrt(len(weights))
    step = side + 0.35  # a gap of a third of a word
    for word, values in enumerate(weights):
        down, right = divmod(word, side)
        x, y = right * step, down * step
        place = {"extent": (x, x + side, y + side, y), "vmin": 0, "vmax": weights.max()}
        drawn = axes.imshow(values.reshape(side, side), cmap=MAP, **place)
        axes.plot(x + right + 0.5, y + down + 0.5, marker="x", color=MARK, markersize=22 / side, markeredgewidth=1.3)
    axes.set_xlim(0, side * step - 0.35)
    axes.set_ylim(side * step - 0.35, 0)
    axes.set_frame_on(False)
    return drawn


def attention_rollout(outer: Sequence[Float[np.ndarray, "heads tokens tokens"]]) -> Float[np.ndarray, "tokens tokens"]:
    """The origin of the content of every token after all blocks; rows sum to one.

    Heads are averaged, half of each token stays where it is (the residual), and blocks are multiplied.
    Source: attention rollout, arXiv 2005.00928.
    """
    flow = np.eye(outer[0].shape[-1])
    for weights in outer:
        flow = (0.5 * weights.mean(axis=0) + 0.5 * np.eye(len(flow))) @ flow
    return flow


def class_attention(model: Model, images: Images, *, block: int | None = None):
    """The attention of the class token: over the image, by each head, and rolled out over the depth (figure 7).

    Args:
        block: from 0; by default the last.

    Raises:
        InputError: the model has no class token, there is no such block, or an image cannot be read.
    """
    config = model.config
    if not model.num_prefix_tokens:
        raise InputError(
            f"{config.name} has no class token: a PyramidTNT averages its last sentences. outer-attention shows what "
            "its patches attend to"
        )
    block = chosen_block(block, range(config.depth), "outer transformer")
    heads, grid, first = config.outer_heads, grid_size(config), model.num_prefix_tokens
    columns = min(6, 3 + heads)

    def draw(part, seen: Preprocessed) -> None:
        _, outer = attention_of(model, seen)
        image, mean, rolled, *each = panels(part, 3 + heads, columns)
        show_image(image, seen.pixels, "image")
        of_class = outer[block][:, 0, first:].reshape(heads, *grid)
        show_map(mean, of_class.mean(axis=0), seen.pixels, f"block {block}, mean")
        show_map(rolled, attention_rollout(outer)[0, first:].reshape(grid), seen.pixels, "all blocks, rollout")
        for head, axes in enumerate(each):
            show_map(axes, of_class[head], seen.pixels, f"block {block}, head {head}")
        bar_of_each(part, [mean, rolled, *each], "attention, of each map")
        part.suptitle("Attention of the class token", fontsize=9)

    return per_image(model, images, (PANEL * columns, PANEL * -(-(3 + heads) // columns) + 0.5), draw)
