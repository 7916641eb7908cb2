"""One step of training as a pure function of (state, batch)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tnt_jax.config import TrainConfig
from tnt_jax.data.mixing import prepare_training
from tnt_jax.training.optimizer import ema_decay


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint holds."""

    step: jax.Array
    """Steps done, int32 ()."""
    params: dict
    ema: dict
    """Average of the parameters over the steps."""
    opt_state: optax.OptState


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the initial parameters."""
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


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

    The batch holds image uint8 (batch, height, width, channels) and label int32 (batch,). Metrics are float32 scalars:
    loss and
    grad_norm before the update, accuracy of the training batch against the likelier class of each target,
    learning_rate.
    """

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        mix_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        images, targets = prepare_training(
            batch["image"], batch["label"], data=config.data, num_classes=config.model.num_classes, key=mix_key
        )

        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(images, key=model_key)
            return soft_cross_entropy(logits, targets), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(config.optimizer, state.step + 1)
        ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, params)
        metrics = {
            "loss": loss,
            "accuracy": (logits.argmax(-1) == targets.argmax(-1)).mean(),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step
