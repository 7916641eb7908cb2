"""The losses by their names, and how one is weighted. A task names those that it can have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, UInt16

from tnt_jax.tasks.detection_losses import detection_loss
from tnt_jax.tasks.task import Outputs, Task

Logits = Float[Array | np.ndarray, "batch *places outputs"]
Labels = UInt16[Array | np.ndarray, "batch height width"]
PerOutput = Float[np.ndarray, " outputs"]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A task, and how its loss weighs."""

    task: Task
    outputs: Outputs
    """The meaning of the model's outputs, as `model.json` has it."""
    name: str | None = None
    """Of `LOSSES`; None for the first that the task has."""
    focal_gamma: float = 0.0
    class_weights: PerOutput | None = None
    """Weight of each class, label or target in the loss; None for 1."""
    positive_weights: PerOutput | None = None
    """Weight of each label where an image has it; None for 1."""

    def loss(self, logits: Logits, targets: Logits | Labels) -> Float[Array, ""]:
        """Mean over the batch, and where each output has a loss over the outputs, in float32."""
        return LOSSES[self.name or self.task.losses[0]](self, logits.astype(jnp.float32), targets).mean()


def cross_entropy(objective: Objective, logits: Logits, targets: Logits) -> Float[Array, " batch"]:
    """-sum(weights * targets * (1 - p) ** gamma * log p), p = softmax(logits). Without weights and gamma, optax's."""
    if objective.class_weights is not None:
        targets = targets * objective.class_weights.astype(np.float32)
    if objective.focal_gamma:
        targets = targets * jnp.exp(objective.focal_gamma * _log_of_the_others(logits))
    return optax.softmax_cross_entropy(logits, targets)


def _log_of_the_others(logits: Logits) -> Logits:
    """log(1 - p), p = softmax(logits), also where p rounds to 1: a power below 1 has no derivative at 0."""
    likeliest = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)
    others = jnp.where(likeliest, jnp.finfo(logits.dtype).min, logits)
    of_likeliest = jax.nn.logsumexp(others, -1, keepdims=True) - jax.nn.logsumexp(logits, -1, keepdims=True)
    # Of all others p is at most a half.
    p = jnp.where(likeliest, 0.0, jax.nn.softmax(logits))
    return jnp.where(likeliest, of_likeliest, jnp.log1p(-p))


def binary_cross_entropy(objective: Objective, logits: Logits, targets: Logits) -> Logits:
    """Of each label, linear in its target: that of a present label by its share, and that of an absent one by the rest.

    With gamma, optax's focal loss (arXiv 1708.02002).
    """

    def of(present: float) -> Logits:
        label = jnp.full_like(logits, present)
        if objective.focal_gamma:
            return optax.sigmoid_focal_loss(logits, label, gamma=objective.focal_gamma)
        return optax.sigmoid_binary_cross_entropy(logits, label)

    weights = 1.0 if objective.positive_weights is None else objective.positive_weights.astype(np.float32)
    return _weighted(objective, targets * weights * of(1.0) + (1 - targets) * of(0.0))


def squared_error(objective: Objective, outputs: Logits, targets: Logits) -> Logits:
    """Of each output."""
    return _weighted(objective, optax.squared_error(outputs, targets))


def _weighted(objective: Objective, losses: Logits) -> Logits:
    return losses if objective.class_weights is None else losses * objective.class_weights.astype(np.float32)


def pixel_cross_entropy(objective: Objective, logits: Logits, labels: Labels) -> Float[Array, " batch"]:
    """Of each image the mean over its pixels that have a class, weighed by it, as PyTorch's `cross_entropy` has it.

    An image by itself, so that the parts of a batch have the same loss as the whole. Without such a pixel it is 0.
    """
    own = _own_class(logits, labels)
    losses = jax.nn.logsumexp(logits, -1) - jnp.where(own, logits, 0).sum(-1)
    weights = own.any(-1).astype(logits.dtype)
    if objective.class_weights is not None:
        weights = jnp.where(own, objective.class_weights.astype(np.float32), 0).sum(-1)
    total = weights.sum((1, 2))
    return (losses * weights).sum((1, 2)) / jnp.where(total > 0, total, 1)


def cross_entropy_dice(objective: Objective, logits: Logits, labels: Labels) -> Float[Array, " batch"]:
    """Cross-entropy plus Dice: of each class that an image has, 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) over its
    pixels that have a class, and the mean over these classes.

    Source: V-Net (arXiv 1606.04797), with MaskFormer's 1.
    """
    own = _own_class(logits, labels)
    p = jnp.where(own.any(-1, keepdims=True), jax.nn.softmax(logits), 0)
    both, of_p, of_t = (each.sum((1, 2)) for each in (jnp.where(own, p, 0), p, own.astype(p.dtype)))
    there = of_t > 0
    dice = jnp.where(there, 1 - (2 * both + 1) / (of_p + of_t + 1), 0).sum(-1) / jnp.maximum(there.sum(-1), 1)
    return pixel_cross_entropy(objective, logits, labels) + dice


def _own_class(logits: Logits, labels: Labels) -> Bool[Array, "batch height width outputs"]:
    """True where a class is that of the pixel; none is that of an ignored one. No gather: its gradient is a scatter."""
    return labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)


LOSSES = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "squared_error": squared_error,
    "cross_entropy_dice": cross_entropy_dice,
    "pixel_cross_entropy": pixel_cross_entropy,
    "detection": lambda objective, logits, labels: detection_loss(logits, labels),
    "detection_giou": lambda objective, logits, labels: detection_loss(logits, labels, by_giou=True),
}
"""From an objective, what the head gives and soft targets to a loss of each image, or of each of its outputs."""
