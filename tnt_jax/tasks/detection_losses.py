"""The losses of detectors: RetinaNet's focal loss with a loss of boxes, and DETR's loss of sets.

A target is an image's label as `tnt_jax.tasks.detection` has it; crowds and rows without a class teach nothing.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from tnt_jax.tasks.boxes import centred, corners, decode, encode, giou, iou

FOREGROUND, BACKGROUND = 0.5, 0.4
"""Overlaps from which an anchor belongs to a box, and below which it belongs to none (arXiv 1708.02002)."""
ALPHA, GAMMA = 0.25, 2.0
NO_OBJECT = 0.1
"""Weight of the class of queries without a box, as of DETR's next three numbers (arXiv 2005.12872)."""
CLASS_COST, L1_COST, GIOU_COST = 1.0, 5.0, 2.0
FEW_ROWS = (8, 32)
NEVER = 1e4
"""The cost of a query for a row without a box: each has the same, so that it changes no other row's choice."""
Outputs = Float[Array, "batch ..."]
Targets = Float[Array, "batch rows 7"]


def boxes_and_classes(targets: Targets) -> tuple[Float[Array, "batch boxes 4"], Int[Array, "batch boxes"]]:
    """The boxes that teach, and their classes; -1 where a row has none. Such a box is the whole image."""
    rows = targets[:, 1:]
    classes = jnp.where(rows[..., 5] > 0, -1, rows[..., 4]).astype(jnp.int32)
    return jnp.where(classes[..., None] < 0, jnp.array([0.0, 0, 1, 1]), rows[..., :4]), classes


def match_anchors(
    boxes: Float[Array, "boxes 4"], there: Bool[Array, " boxes"], anchors: Float[Array, "anchors 4"]
) -> tuple[Int[Array, " anchors"], Bool[Array, " anchors"], Bool[Array, " anchors"]]:
    """The box of each anchor, and whether it belongs to it, and whether to none.

    An anchor belongs to the box that it overlaps most where that is `FOREGROUND`, and where no anchor overlaps the box
    more. Between the two bounds it is left out.
    """
    found = jnp.where(there[:, None], iou(boxes[:, None], anchors[None]), -1)
    best, of_box = found.max(0), found.max(1)
    low_quality = (there[:, None] & (found == of_box[:, None])).any(0)
    belongs = (best >= FOREGROUND) | low_quality
    return found.argmax(0), belongs, (best < BACKGROUND) & ~belongs


def anchor_losses(
    logits: Float[Array, "batch anchors outputs"], targets: Targets, *, by_giou: bool = False
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Focal loss of the classes, and L1 of the encoded boxes (or 1 - GIoU of the boxes), of each image.

    Both are sums over anchors, over the number of those that belong to a box.
    Source: torchvision's RetinaNet.
    """
    boxes, classes = boxes_and_classes(targets)

    def of_image(logits, boxes, classes):
        scores, encoded, anchors = logits[:, :-8], logits[:, -8:-4], logits[:, -4:]
        box, belongs, to_none = match_anchors(boxes, classes >= 0, anchors)
        own = belongs[:, None] & (classes[box][:, None] == jnp.arange(scores.shape[1]))
        focal = optax.sigmoid_focal_loss(scores, own.astype(scores.dtype), alpha=ALPHA, gamma=GAMMA).sum(-1)
        # Any box does where none belongs: its loss is not counted, and must be finite.
        wanted = jnp.where(belongs[:, None], boxes[box], anchors)
        if by_giou:
            of_box = 1 - giou(decode(encoded, anchors), wanted)
        else:
            of_box = jnp.abs(encoded - encode(wanted, anchors)).sum(-1)
        count = jnp.maximum(belongs.sum(), 1)
        return jnp.where(belongs | to_none, focal, 0).sum() / count, jnp.where(belongs, of_box, 0).sum() / count

    # One image after the other: anchors times boxes are many.
    return jax.lax.map(lambda of: of_image(*of), (logits, boxes, classes))


def match_queries(
    logits: Float[Array, "queries outputs"], boxes: Float[Array, "boxes 4"], classes: Int[Array, " boxes"]
) -> tuple[Int[Array, " queries"], Bool[Array, " queries"]]:
    """The box that the assignment of least cost gives to each query, and whether it gives it one (equation 1)."""
    chances, found = jax.nn.softmax(logits[:, :-4]), logits[:, -4:]
    cost = L1_COST * jnp.abs(centred(boxes)[:, None] - found).sum(-1)
    cost -= GIOU_COST * giou(boxes[:, None], corners(found)[None])
    cost -= CLASS_COST * chances[:, jnp.maximum(classes, 0)].T
    cost = jnp.where((classes >= 0)[:, None], jnp.nan_to_num(cost, nan=NEVER, posinf=NEVER, neginf=NEVER), NEVER)
    rows, columns = optax.assignment.hungarian_algorithm(jax.lax.stop_gradient(cost))
    box = jnp.zeros(len(logits), jnp.int32).at[columns].set(rows)
    return box, jnp.zeros(len(logits), bool).at[columns].set(classes[rows] >= 0)


def set_losses(
    logits: Float[Array, "batch layers queries outputs"], targets: Targets
) -> tuple[Float[Array, " layers"], Float[Array, " layers"], Float[Array, " layers"]]:
    """Cross-entropy of the classes, L1 and 1 - GIoU of the boxes, of each layer of the decoder.

    All are over the boxes of the whole batch, and the first by the weights of the classes, so that an image with many
    boxes counts more. Source: DETR, as transformers has it.
    """
    boxes, classes = boxes_and_classes(targets)
    queries = logits.shape[2]
    boxes, classes = boxes[:, :queries], classes[:, :queries]
    few = [rows for rows in FEW_ROWS if rows < boxes.shape[1]]

    def match(rows: int | None):
        each = jax.vmap(jax.vmap(match_queries, (0, None, None)))
        return lambda: each(logits, boxes[:, :rows], classes[:, :rows])

    # An assignment takes time with its rows, of which most images have few.
    enough = [(classes[:, rows:] < 0).all() for rows in few]
    index = sum((~each).astype(jnp.int32) for each in enough) if few else 0
    box, has = jax.lax.switch(index, [match(rows) for rows in [*few, None]])
    count = jnp.maximum((classes >= 0).sum(), 1)
    none = logits.shape[-1] - 5
    wanted = jnp.where(has, jnp.take_along_axis(classes[:, None], box, -1), none)
    own = wanted[..., None] == jnp.arange(none + 1)
    weights = jnp.where(has, 1, NO_OBJECT)
    entropy = -jnp.where(own, jax.nn.log_softmax(logits[..., :-4]), 0).sum(-1)
    of_classes = (weights * entropy).sum((0, 2)) / weights.sum((0, 2))
    found, theirs = logits[..., -4:], jnp.take_along_axis(boxes[:, None], box[..., None], 2)
    l1 = jnp.where(has, jnp.abs(found - centred(theirs)).sum(-1), 0).sum((0, 2)) / count
    of_hull = jnp.where(has, 1 - giou(corners(found), theirs), 0).sum((0, 2)) / count
    return of_classes, l1, of_hull


def detection_loss(logits: Outputs, targets: Targets, *, by_giou: bool = False) -> Float[Array, " batch"]:
    """The loss of each image; of a set, which is one of the whole batch, the same for each."""
    if logits.ndim == 3:
        classes, boxes = anchor_losses(logits, targets, by_giou=by_giou)
        return classes + boxes
    classes, l1, of_hull = set_losses(logits, targets)
    total = (CLASS_COST * classes + L1_COST * l1 + GIOU_COST * of_hull).sum()
    return jnp.broadcast_to(total, len(logits))
