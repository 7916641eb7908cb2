"""One step of training, and one of evaluation, as pure functions of (state, batch)."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tnt_jax.config import TrainConfig
from tnt_jax.data.mixing import Normalisation, normalise, prepare_training
from tnt_jax.storage.trained import average_like
from tnt_jax.training.mesh import to_devices
from tnt_jax.training.optimizer import ema_decay


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint holds."""

    step: Any
    """Steps done, int32 (). Like the leaves of the others: an array, or the shape or the sharding of one."""
    params: dict
    """Parameters, and where the model has batch norm its running averages, which no optimizer moves."""
    ema: dict
    """Average of the parameters over the steps."""
    opt_state: optax.OptState


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the initial parameters, in float32 or more."""
    average = jax.tree.map(lambda leaf, like: jnp.array(leaf, like.dtype), params, average_like(params))
    return TrainState(jnp.int32(0), params, average, optimizer.init(params))


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of -sum(targets * log softmax(logits)), in float32."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The function (state, batch) -> (state, metrics), for a configuration whose model is resolved.

    The batch holds image uint8 (batch, height, width, channels) and label int32 (batch,).
    Metrics are float32 scalars: loss and grad_norm before the update, param_norm after it, learning_rate, and accuracy
    of the training batch against the likelier class of each target.
    """

    def loss_and_rest(params: dict, images: jax.Array, targets: jax.Array, key: jax.Array):
        model = nnx.merge(graphdef, params)
        logits = model(images, key)
        accuracy = (logits.argmax(-1) == targets.argmax(-1)).mean()
        return soft_cross_entropy(logits, targets), (accuracy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    value_and_grad = jax.value_and_grad(loss_and_rest, has_aux=True)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        mix_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        images, targets = prepare_training(
            batch["image"], batch["label"], data=config.data, num_classes=config.model.num_classes, key=mix_key
        )
        grad = accumulated(value_and_grad, config.accumulation_steps)
        (loss, (accuracy, statistics)), grads = grad(state.params, images, targets, model_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = overwritten(optax.apply_updates(state.params, updates), statistics)
        decay = ema_decay(config.optimizer, state.step + 1)
        ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, params)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


def overwritten(params: dict, statistics: dict) -> dict:
    """Parameters with the running averages that a forward pass has left, a part of the same tree."""
    return params | {
        name: overwritten(params[name], value) if isinstance(value, dict) else value
        for name, value in statistics.items()
    }


def _part_of(params: dict, like: dict) -> dict:
    """The leaves of a tree that are at the places of another."""
    return {
        name: _part_of(params[name], value) if isinstance(value, dict) else params[name] for name, value in like.items()
    }


def accumulated(value_and_grad: Callable, steps: int) -> Callable:
    """The same values and gradients, computed for a `steps`-th of the images at a time and averaged.

    Running averages go from each part to the next. Batch norm sees a part at a time.
    """
    if steps == 1:
        return value_and_grad

    def parts(x: jax.Array) -> jax.Array:
        # Every part takes images from every device, so that none has to move.
        return x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1)

    def of_all_parts(params: dict, images: jax.Array, targets: jax.Array, key: jax.Array):
        def of_part(statistics: dict, part: tuple):
            (loss, (accuracy, statistics)), grads = value_and_grad(overwritten(params, statistics), *part)
            return statistics, (loss, accuracy, grads)

        def add(sums, part):
            statistics, new = of_part(sums[0], part)
            return (statistics, jax.tree.map(jnp.add, sums[1], new)), None

        each = (parts(images), parts(targets), jax.random.split(key, steps))
        statistics, sums = jax.eval_shape(of_part, {}, jax.tree.map(lambda leaf: leaf[0], each))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)
        (statistics, sums), _ = jax.lax.scan(add, (_part_of(params, statistics), zeros), each)
        loss, accuracy, grads = jax.tree.map(lambda leaf: leaf / steps, sums)
        return (loss, (accuracy, statistics)), grads

    return of_all_parts


def make_eval_step(
    graphdef: nnx.GraphDef, own: dict, normalisation: Normalisation
) -> Callable[[dict[str, dict], dict], dict]:
    """The function (parameters by name, batch) -> by name, sums over the images that the batch's mask marks as real.

    The sums: count, top1 and top5 (right answers), loss (cross-entropy). Averages are rounded to the parameters' own
    dtypes first, those of `own`, as in the model that is loaded.
    """

    def eval_step(weights: dict[str, dict], batch: dict) -> dict:
        inputs = normalise(batch["image"], normalisation)
        return {name: sums(params, inputs, batch["label"], batch["mask"]) for name, params in weights.items()}

    def sums(params: dict, inputs: jax.Array, labels: jax.Array, mask: jax.Array) -> dict:
        params = jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), params, own)
        logits = nnx.merge(graphdef, params)(inputs).astype(jnp.float32)
        _, likeliest = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        right = likeliest == labels[:, None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        values = {"count": jnp.ones_like(loss), "top1": right[:, 0], "top5": right.any(-1), "loss": loss}
        return {name: jnp.where(mask, value, 0).sum() for name, value in values.items()}

    return eval_step


def evaluate(
    eval_step: Callable, weights: dict[str, dict], batches: Iterable[dict], mesh: Mesh, stop: Callable[[], int | None]
) -> dict[str, float] | None:
    """Scores of several parameters by their names, each image prepared once.

    Args:
        stop: asked after each batch.

    Returns:
        count (images seen), and for each name NAME_top1 and NAME_top5 (shares of 1) and NAME_loss (mean); None if it
        was stopped.
    """
    totals = None
    for batch in batches:
        sums = eval_step(weights, to_devices(batch, mesh))
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        if stop():
            return None
    scores = {}
    for name, sums in totals.items():
        sums = {each: float(total) for each, total in sums.items()}
        scores["count"] = int(sums.pop("count"))
        scores |= {f"{name}_{each}": total / scores["count"] for each, total in sums.items()}
    return scores
