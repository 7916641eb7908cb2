"""Images and those that a model finds most similar to them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from tnt_jax.data.sources import Split
from tnt_jax.visualize.canvas import new_figure, panels, show_image, title_of, visible


def neighbours(
    images: Split,
    queries: Sequence[int],
    nearest: Int[np.ndarray, "images neighbours"],
    labels: Int[np.ndarray, " images"],
    names: Sequence[str],
):
    """A row for each query: the image, and its nearest, the most similar first. A cross stands before another class.

    Returns:
        A matplotlib figure.
    """
    columns = 1 + nearest.shape[1]
    figure = new_figure(1.3 * columns, 1.55 * len(queries))
    shown = [(index, query) for query in queries for index in (query, *nearest[query])]
    for axes, (index, query) in zip(panels(figure, len(shown), columns), shown, strict=True):
        show_image(axes, visible(np.asarray(images[int(index)][0])))
        title_of(axes, ("" if labels[index] == labels[query] else "✗ ") + names[labels[index]])
    return figure
