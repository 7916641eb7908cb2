"""What a task means in training: the loss, what is said of a training batch, and the scores of an evaluation.

single_label: one class an image; softmax. multi_label: any number of classes an image; a sigmoid for each. regression:
numbers, which are standardised: the network learns (target - mean) / std over the training images.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Num

from tnt_jax.config import TASKS, InputError, Task, TrainConfig
from tnt_jax.data.targets import balanced_class_weights, balanced_positive_weights, in_units
from tnt_jax.storage.description import Outputs
from tnt_jax.tasks.metrics import class_metrics, mean_of_defined, multi_label_metrics, regression_metrics

Logits = Float[Array | np.ndarray, "batch outputs"]
PerOutput = Float[np.ndarray, " outputs"]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """What a run minimises and how it is scored."""

    task: Task
    focal_gamma: float = 0.0
    class_weights: PerOutput | None = None
    """Weight of each class, label or target in the loss; None for 1."""
    positive_weights: PerOutput | None = None
    """Weight of each label where an image has it; None for 1."""
    target_mean: PerOutput | None = None
    """Of the training targets of a regression; None for 0."""
    target_std: PerOutput | None = None

    @property
    def outputs(self) -> Outputs:
        """What the outputs mean, as `model.json` says it."""
        mean, std = (None if each is None else tuple(each.tolist()) for each in (self.target_mean, self.target_std))
        return Outputs(self.task, target_mean=mean, target_std=std)

    def standardised(self, labels: Num[Array | np.ndarray, "batch ..."]) -> Num[Array | np.ndarray, "batch ..."]:
        """Targets of a regression as the network learns them; other labels as they are."""
        if self.task != "regression" or self.target_mean is None:
            return labels
        return (labels - self.target_mean.astype(np.float32)) / self.target_std.astype(np.float32)

    def loss(self, outputs: Logits, targets: Logits) -> Float[Array, ""]:
        """Mean over the batch, and but for single_label over the outputs, in float32."""
        return _LOSSES[self.task](self, outputs.astype(jnp.float32), targets).mean()

    def measure(self, outputs: Logits, targets: Logits) -> dict[str, Float[Array, ""]]:
        """What is said of a training batch beside its loss: accuracy, or R2 of standardised targets."""
        if self.task == "single_label":
            return {"accuracy": (outputs.argmax(-1) == targets.argmax(-1)).mean()}
        if self.task == "multi_label":
            return {"accuracy": ((outputs >= 0) == (targets > 0.5)).mean()}
        return {"r2": 1 - optax.squared_error(outputs.astype(jnp.float32), targets).mean()}

    def evaluated(self, outputs: Logits, labels: Num[Array | np.ndarray, "batch ..."], mask: Array) -> dict[str, Array]:
        """What `scores` needs of a batch: sums for single_label, and otherwise every row of it."""
        if self.task != "single_label":
            return {"outputs": outputs, "labels": labels, "mask": mask}
        classes = outputs.shape[-1]
        _, likeliest = jax.lax.top_k(outputs, min(5, classes))
        hit = likeliest == labels[:, None]
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        loss = jnp.where(jnp.isfinite(outputs).all(-1), loss, jnp.nan)
        values = {"count": jnp.ones_like(loss), "top1": hit[:, 0], "top5": hit.any(-1), "loss": loss}
        sums = {name: jnp.where(mask, value, 0).sum() for name, value in values.items()}
        predictions = likeliest[:, 0]
        chosen = {"right": (labels, mask & hit[:, 0]), "labelled": (labels, mask), "predicted": (predictions, mask)}
        return sums | {
            name: jnp.zeros(classes, jnp.int32).at[at].add(counts.astype(jnp.int32))
            for name, (at, counts) in chosen.items()
        }

    def scores(self, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float | None]:
        """The metrics of `tnt_jax.config.TASKS` over all batches, and count, the number of images.

        A metric that is undefined for these images, as R2 of one image is, is None. The loss is NaN where an output is
        not finite.
        """
        batches = list(batches)
        if self.task == "single_label":
            sums = {name: sum(np.asarray(batch[name], np.float64) for batch in batches) for name in batches[0]}
            of_classes = class_metrics(*(sums.pop(name) for name in ("right", "labelled", "predicted")))
            count = int(sums.pop("count"))
            found = {name: float(total) / count for name, total in sums.items()} | of_classes
        else:
            mask = np.concatenate([batch["mask"] for batch in batches])
            outputs, labels = (
                np.concatenate([np.asarray(batch[name]) for batch in batches])[mask] for name in ("outputs", "labels")
            )
            count, found = len(outputs), self._scores_of_rows(outputs, labels)
        undefined = {name for name in found if name != "loss" and math.isnan(found[name])}
        return {"count": count} | {name: None if name in undefined else float(found[name]) for name in TASKS[self.task]}

    def _scores_of_rows(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        if not np.isfinite(outputs).all():
            return dict.fromkeys(TASKS[self.task], math.nan)
        if self.task == "multi_label":
            loss = np.logaddexp(0, outputs.astype(np.float64)) - labels * outputs
            return multi_label_metrics(labels, outputs) | {"loss": loss.mean()}
        errors = outputs - np.asarray(self.standardised(labels))
        metrics = regression_metrics(labels, in_units(outputs, self.target_mean, self.target_std))
        return {name: mean_of_defined(value) for name, value in metrics.items()} | {"loss": np.square(errors).mean()}


def _cross_entropy(objective: Objective, logits: Logits, targets: Logits) -> Float[Array, " batch"]:
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


def _binary_cross_entropy(objective: Objective, logits: Logits, targets: Logits) -> Logits:
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


def _squared_error(objective: Objective, outputs: Logits, targets: Logits) -> Logits:
    return _weighted(objective, optax.squared_error(outputs, targets))


def _weighted(objective: Objective, losses: Logits) -> Logits:
    return losses if objective.class_weights is None else losses * objective.class_weights.astype(np.float32)


_LOSSES = {"single_label": _cross_entropy, "multi_label": _binary_cross_entropy, "regression": _squared_error}


def objective_of(config: TrainConfig, targets: np.ndarray | None = None) -> Objective:
    """The objective of a configuration whose model is complete.

    Args:
        targets: of the training images, checked. Without them, as for a plan, weights are 1 and targets as they are.

    Raises:
        InputError: there are not as many weights as classes.
    """
    task, loss = config.data.task, config.loss
    weights: dict[str, np.ndarray | None] = {"class_weights": None, "positive_weights": None}
    balanced = {"class_weights": balanced_class_weights, "positive_weights": balanced_positive_weights}
    for name in weights:
        value = getattr(loss, name)
        if value == "balanced" and targets is not None:
            weights[name] = balanced[name](targets, config.model.num_classes)
        elif isinstance(value, tuple):
            if len(value) != config.model.num_classes:
                raise InputError(
                    f"loss.{name} has {len(value)} numbers, and {config.data.source} has {config.model.num_classes} "
                    "outputs"
                )
            weights[name] = np.array(value, np.float64)
    if task == "regression" and targets is not None:
        targets = np.asarray(targets, np.float64)
        weights |= {"target_mean": targets.mean(axis=0), "target_std": targets.std(axis=0)}
    return Objective(task, loss.focal_gamma, **weights)
