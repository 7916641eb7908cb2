"""Words and sentences: embeddings, feature maps, and how they lie to each other (figures 3 and 4).

Each function returns a matplotlib figure.
"""

from collections.abc import Sequence

import numpy as np
from flax import nnx
from jaxtyping import Float

from tnt_jax.config import InputError
from tnt_jax.data.decode import ImageSource
from tnt_jax.models.tnt import block_indices
from tnt_jax.models.variants import Model
from tnt_jax.visualize.canvas import (
    MAP,
    PANEL,
    Preprocessed,
    new_figure,
    panels,
    per_image,
    preprocess,
    show_image,
    title_of,
)

Images = ImageSource | Sequence[ImageSource]
MOST_POINTS = 2000  # t-SNE of more takes minutes, and they cover each other
CHANNELS = 12  # of a block in `features`, as in the paper's figure 3


def depth_of(model: Model) -> int:
    """Blocks of a model, over all stages."""
    return int(np.sum(model.config.depth))


@nnx.jit(static_argnums=(2,))
def _intermediates(model: Model, batch, blocks: tuple[int, ...]):
    return model.forward_intermediates(batch, blocks, words=True)


def words(model: Model, images: Images):
    """Word embeddings of every block, the mean over their channels, each where it lies in the image (figure 4).

    Raises:
        InputError: an image cannot be read.
    """
    blocks = tuple(range(depth_of(model)))
    columns = min(5, 1 + len(blocks))

    def draw(part, seen: Preprocessed) -> None:
        image, *each = panels(part, 1 + len(blocks), columns)
        show_image(image, seen.pixels, "image")
        for block, axes, (_, embeddings) in zip(blocks, each, _intermediates(model, seen.batch, blocks), strict=True):
            axes.imshow(tiled(np.asarray(embeddings[0]).mean(axis=-1)), cmap=MAP, interpolation="nearest")
            title_of(axes, f"block {block}")
        part.suptitle("Words, mean over channels, where they lie in the image", fontsize=9)

    return per_image(model, images, (PANEL * columns, PANEL * -(-(1 + len(blocks)) // columns) + 0.5), draw)


def tiled(values: Float[np.ndarray, "rows columns words"]) -> Float[np.ndarray, "rows*side columns*side"]:
    """The words of all patches as they lie in the image."""
    rows, columns, count = values.shape
    side = int(np.sqrt(count))
    return values.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)


def features(model: Model, images: Images, *, blocks: Sequence[int] | None = None):
    """Twelve feature maps of each of some blocks: channels of the sentences, drawn at random (figure 3a).

    Args:
        blocks: from 0; by default the first, the middle and the last, which of 12 are the paper's 1, 6 and 12.

    Raises:
        InputError: there is no such block, or an image cannot be read.
    """
    depth = depth_of(model)
    chosen = sorted(block_indices(blocks or {0, (depth - 1) // 2, depth - 1}, depth))

    def draw(part, seen: Preprocessed) -> None:
        maps = _intermediates(model, seen.batch, tuple(chosen))
        axes = part.subplots(len(chosen), CHANNELS + 1, squeeze=False)
        for each in axes.ravel():
            each.set_axis_off()
        for row, block, (sentences, _) in zip(axes, chosen, maps, strict=True):
            values = np.asarray(sentences[0])
            show_image(row[0], seen.pixels, f"block {block}")
            drawn = np.random.default_rng(block).choice(
                values.shape[-1], min(CHANNELS, values.shape[-1]), replace=False
            )
            for panel, channel in zip(row[1:], sorted(drawn), strict=False):
                panel.imshow(values[..., channel], cmap=MAP, interpolation="nearest")
                title_of(panel, str(channel))
        part.suptitle("Feature maps: channels of the sentences, chosen at random", fontsize=9)

    return per_image(model, images, (0.8 * (CHANNELS + 1), 1.05 * len(chosen) + 0.4), draw)


def map_tsne(model: Model, image: ImageSource):
    """The t-SNE of the feature maps of the last block: a point for each channel of the sentences (figure 3b).

    Maps that say the same lie together; a model that uses its channels well spreads them.

    Raises:
        InputError: the image cannot be read, or the last block has a single sentence, which makes no map.
    """
    seen = preprocess(model, image)
    ((sentences, _),) = _intermediates(model, seen.batch, (depth_of(model) - 1,))
    values = np.asarray(sentences[0], np.float32)
    if values.shape[0] * values.shape[1] < 2:
        raise InputError(
            f"the last block of {model.config.name} has a single sentence at this size, which makes no map"
        )
    points = embed(values.reshape(-1, values.shape[-1]).T)
    figure = new_figure(6, 4.5)
    axes = figure.subplots()
    drawn = axes.scatter(*points.T, c=values.std(axis=(0, 1)), cmap=MAP, s=14)
    figure.colorbar(drawn, label="standard deviation over the image")
    _bare(axes, f"t-SNE of the {len(points)} feature maps of the last block")
    return figure


def image_tsne(features: Float[np.ndarray, "images dim"], labels: np.ndarray, class_names: Sequence[str]):
    """The t-SNE of images by the features before the head: a point for each, its class as colour and marker.

    Images with any number of labels are coloured by their label, if they have one alone; those of a regression by their
    first target. Of more than 2,000 images 2,000 are drawn, evenly spread.

    Args:
        labels: int (images,), or float32 (images, outputs): of 0 and 1, or of the targets of a regression.

    Raises:
        InputError: there are fewer than two images.
    """
    drawn = np.unique(np.linspace(0, len(labels) - 1, MOST_POINTS).astype(int))
    points, labels = embed(features[drawn]), labels[drawn]
    figure = new_figure(8, 5.5)
    axes = figure.subplots()
    _bare(axes, f"t-SNE of {len(points):,} images, from what the head sees")
    if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
        shown = axes.scatter(*points.T, s=12, c=labels[:, 0], cmap=MAP)
        figure.colorbar(shown, label=class_names[0])
        return figure
    if labels.ndim == 2:
        there = (labels > 0.5).sum(axis=1)
        several = len(class_names)
        labels = np.where(there == 1, labels.argmax(axis=1), np.where(there, several, several + 1))
        class_names = (*class_names, "several labels", "no label")
    for place, label in enumerate(np.unique(labels)):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]
        of_class = points[labels == label]
        axes.scatter(*of_class.T, s=12, color=colour, marker=marker, label=class_names[label])
        # At a point of the class, because the middle of two clusters lies in neither.
        middle = of_class[np.linalg.norm(of_class - np.median(of_class, axis=0), axis=1).argmin()]
        if len(class_names) <= 2 * len(COLOURS):
            axes.annotate(class_names[label], middle, fontsize=9, ha="center", va="center", bbox=LABEL_BOX)
    if len(class_names) <= 2 * len(COLOURS):
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


# Petroff's ten colours (arXiv 2107.02270), chosen to be told apart by the colour-blind.
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
MARKERS = "o^sDvP*X<>"
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}


def embed(points: Float[np.ndarray, "points dim"]) -> Float[np.ndarray, "points 2"]:
    """t-SNE, the same for the same points.

    Raises:
        InputError: there are fewer than two points, or all are equal.
    """
    from sklearn.manifold import TSNE

    if len(points) < 2:
        raise InputError(f"t-SNE of {len(points)} point(s) shows nothing")
    if np.ptp(points, axis=0).max() == 0:  # scikit-learn's C code would read beyond its arrays
        raise InputError(f"t-SNE shows nothing: the features of all {len(points)} images are equal")
    return TSNE(perplexity=min(30, (len(points) - 1) / 3 + 0.5), init="pca", random_state=0).fit_transform(points)


def _bare(axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
