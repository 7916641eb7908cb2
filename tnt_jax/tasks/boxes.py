"""Boxes: corners x0, y0, x1, y1 as shares of the image, so that nothing here depends on a size.

NumPy and JAX alike: functions take `np` or `jax.numpy` from their arguments' kind where it matters.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import jax

Boxes = Float[Any, "*leading 4"]
LARGEST = float(np.log(1000 / 16))
"""Of an encoded width or height, as torchvision bounds it before the exponential."""


def area(boxes: Boxes) -> Float[Any, "*leading"]:
    """The area of each box."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlap(one: Boxes, other: Boxes) -> tuple["jax.Array", "jax.Array", "jax.Array"]:
    """Of boxes that are broadcast against each other: intersection over union, union, and the area of the hull."""
    low, high = one[..., :2].clip(other[..., :2]), one[..., 2:].clip(None, other[..., 2:])
    sides = (high - low).clip(0)
    shared = sides[..., 0] * sides[..., 1]
    union = area(one) + area(other) - shared
    hull = one[..., 2:].clip(other[..., 2:]) - one[..., :2].clip(None, other[..., :2])
    return shared / union, union, hull[..., 0] * hull[..., 1]


def iou(one: Boxes, other: Boxes) -> "jax.Array":
    """Intersection over union of boxes that are broadcast against each other."""
    return overlap(one, other)[0]


def giou(one: Boxes, other: Boxes) -> "jax.Array":
    """Generalised intersection over union (arXiv 1902.09630)."""
    shared, union, hull = overlap(one, other)
    return shared - (hull - union) / hull


def corners(centred: Boxes) -> Boxes:
    """Corners of boxes that are given by centre, width and height."""
    xp = _library(centred)
    centre, half = centred[..., :2], centred[..., 2:] / 2
    return xp.concatenate([centre - half, centre + half], -1)


def centred(boxes: Boxes) -> Boxes:
    """Centre, width and height of boxes."""
    xp = _library(boxes)
    return xp.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def encode(boxes: Boxes, anchors: Boxes) -> Boxes:
    """Boxes as their anchors see them: the way of the centre in sides of the anchor, and the logarithm of the sides'
    ratio (R-CNN, arXiv 1311.2524, appendix C)."""
    xp = _library(boxes)
    of_boxes, of_anchors = centred(boxes), centred(anchors)
    moved = (of_boxes[..., :2] - of_anchors[..., :2]) / of_anchors[..., 2:]
    return xp.concatenate([moved, xp.log(of_boxes[..., 2:] / of_anchors[..., 2:])], -1)


def decode(encoded: Boxes, anchors: Boxes) -> Boxes:
    """The boxes that `encode` would make of these."""
    xp = _library(encoded)
    of_anchors = centred(anchors)
    centre = encoded[..., :2] * of_anchors[..., 2:] + of_anchors[..., :2]
    sides = xp.exp(encoded[..., 2:].clip(None, LARGEST)) * of_anchors[..., 2:]
    return corners(xp.concatenate([centre, sides], -1))


def suppressed(boxes: "jax.Array", classes: "jax.Array", most: float = 0.5) -> "jax.Array":
    """Non-maximum suppression: True for boxes that overlap a better one of their class by more than `most`.

    Args:
        boxes: (count, 4), the best first.
        classes: (count,).
    """
    import jax
    import jax.numpy as jnp

    count = len(boxes)
    rivals = (iou(boxes[:, None], boxes[None]) > most) & (classes[:, None] == classes[None])
    rivals &= jnp.arange(count)[:, None] < jnp.arange(count)

    def keep(index, gone):
        return gone | (rivals[index] & ~gone[index])

    return jax.lax.fori_loop(0, count, keep, jnp.zeros(count, bool))


def _library(array):
    if isinstance(array, np.ndarray):
        return np
    import jax.numpy as jnp

    return jnp
