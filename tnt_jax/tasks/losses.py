"""The losses by their names, and how one is weighted. A task names those that it can have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tnt_jax.tasks.task import Outputs, Task

Logits = Float[Array | np.ndarray, "batch outputs"]
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

    def loss(self, logits: Logits, targets: Logits) -> Float[Array, ""]:
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


LOSSES = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "squared_error": squared_error,
}
"""From an objective, what the head gives and soft targets to a loss of each image, or of each of its outputs."""
