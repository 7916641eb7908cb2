"""One step of training, and one of evaluation, as pure functions of (state, batch)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tnt_jax.config import TrainConfig
from tnt_jax.data.mixing import Normalisation, normalise, prepare_training
from tnt_jax.storage.run import average_like
from tnt_jax.tasks.losses import Objective
from tnt_jax.training.distillation import Teacher, distillation_loss
from tnt_jax.training.mesh import shard_over_batch
from tnt_jax.training.objective import objective_of
from tnt_jax.training.optimizer import average_of_weights
from tnt_jax.training.trees import frozen_mask, overwritten, part_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint holds."""

    step: Any
    """Steps done, int32 (). Like the leaves of the others: an array, or the shape or the sharding of one."""
    params: dict
    """Parameters in float32 or more, whatever the model's are, and where it has batch norm its running averages, which
    no optimizer moves: what bfloat16 holds, a small step does not change."""
    ema: dict
    """Average of the parameters over the steps."""
    opt_state: optax.OptState


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, in float32 or more; the average starts at the initial parameters."""
    params, average = (
        jax.tree.map(lambda leaf, like: jnp.array(leaf, like.dtype), params, average_like(params)) for _ in range(2)
    )
    return TrainState(jnp.int32(0), params, average, optimizer.init(params))


def make_train_step(
    graphdef: nnx.GraphDef,
    own: dict,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    objective: Objective | None = None,
    teacher: Teacher | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The function (state, batch) -> (state, metrics), for a configuration whose model is resolved.

    The batch holds image (batch, height, width, channels) and label, int32 (batch,) or float32 (batch, outputs); with a
    teacher its parameters too.
    Metrics are float32 scalars: loss and grad_norm before the update, param_norm after it, learning_rate, and what the
    objective measures of the batch.

    Args:
        own: the model's parameters, or their shapes: the step computes with their dtypes.
        objective: by default that of the configuration, without what the training targets say.
    """
    objective = objective or objective_of(config)
    frozen = frozen_mask(own, config.freeze)

    def loss_and_rest(params: dict, images: jax.Array, wanted: tuple[jax.Array, jax.Array | None], keys: jax.Array):
        targets, of_teacher = wanted
        # No gradient of what is frozen is computed, nor of what lies before it alone.
        params = jax.tree.map(lambda leaf, still: jax.lax.stop_gradient(leaf) if still else leaf, params, frozen)
        model = nnx.merge(graphdef, jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), params, own))
        logits = model(images, keys)
        measured = objective.task.measure(logits, targets)
        loss = objective.loss(logits, targets)
        if of_teacher is not None:
            measured["distillation_loss"] = distillation_loss(config.distill, logits, of_teacher)
            loss = (1 - config.distill.alpha) * loss + config.distill.alpha * measured["distillation_loss"]
        return loss, (measured, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    value_and_grad = jax.value_and_grad(loss_and_rest, has_aux=True)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        mix_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        labels = objective.task.standardised(batch["label"], objective.outputs)
        images, targets = prepare_training(
            batch["image"], labels, data=config.data, num_classes=config.model.num_classes, key=mix_key
        )
        # A key for each image, so that it draws the same whatever part of the batch it is computed in.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(model_key, jnp.arange(len(images)))
        images, targets, keys = shard_over_batch(images), shard_over_batch(targets), shard_over_batch(keys)
        grad = accumulated(value_and_grad, config.accumulation_steps)
        of_teacher = teacher and teacher.logits(batch["teacher"], images, config.data)
        (loss, (measured, statistics)), grads = grad(state.params, images, (targets, of_teacher), keys)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = overwritten(optax.apply_updates(state.params, updates), statistics)
        ema = average_of_weights(config.optimizer, state.step + 1, state.ema, params, opt_state, statistics)
        ema = jax.tree.map(lambda average, new, still: new if still else average, ema, params, frozen)
        metrics = {
            "loss": loss,
            **measured,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


def accumulated(value_and_grad: Callable, steps: int) -> Callable:
    """The same values and gradients, computed for a `steps`-th of the images at a time and averaged.

    An image draws from its own key, so dropout and stochastic depth are those of the whole batch. Batch norm sees a
    part at a time, and its running averages go from each part to the next.
    """
    if steps == 1:
        return value_and_grad

    def parts(x: jax.Array) -> jax.Array:
        # Every part takes images from every device, so that none has to move.
        return x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1)

    def of_all_parts(params: dict, images: jax.Array, wanted: tuple, keys: jax.Array):
        def of_part(statistics: dict, part: tuple):
            (loss, (measured, statistics)), grads = value_and_grad(overwritten(params, statistics), *part)
            return statistics, (loss, measured, grads)

        def add(sums, part):
            statistics, new = of_part(sums[0], part)
            return (statistics, jax.tree.map(jnp.add, sums[1], new)), None

        each = jax.tree.map(parts, (images, wanted, keys))
        statistics, sums = jax.eval_shape(of_part, {}, jax.tree.map(lambda leaf: leaf[0], each))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)
        (statistics, sums), _ = jax.lax.scan(add, (part_of(params, statistics), zeros), each)
        loss, measured, grads = jax.tree.map(lambda leaf: leaf / steps, sums)
        return (loss, (measured, statistics)), grads

    return of_all_parts


def make_eval_step(
    graphdef: nnx.GraphDef, own: dict, normalisation: Normalisation, objective: Objective
) -> Callable[[dict[str, dict], dict], dict]:
    """The function (parameters by name, batch) -> by name, what the objective's scores need of the batch.

    Averages are rounded to the parameters' own dtypes first, those of `own`, as in the model that is loaded.
    """

    def eval_step(weights: dict[str, dict], batch: dict) -> dict:
        inputs = normalise(batch["image"], normalisation)
        return {name: evaluated(params, inputs, batch["label"], batch["mask"]) for name, params in weights.items()}

    def evaluated(params: dict, inputs: jax.Array, labels: jax.Array, mask: jax.Array) -> dict:
        params = jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), params, own)
        outputs = nnx.merge(graphdef, params)(inputs).astype(jnp.float32)
        return objective.task.evaluated(outputs, labels, mask)

    return eval_step
