"""Learning rate, the table of optimizers, which parameters decay, and the average of weights."""

import dataclasses
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from tnt_jax.config import OptimizerConfig
from tnt_jax.models.heads import LAST_LAYERS
from tnt_jax.training.trees import frozen_mask, overwritten

NOT_DECAYED = {"class_token", "word_positions", "sentence_positions"}


def learning_rate_schedule(config: OptimizerConfig, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Step (from 0) to learning rate: a line up, which replaces the first part of a cosine over `epochs`, then its end.

    An optimizer without a schedule stays at the peak.

    Source: timm 0.3's CosineLRScheduler with `warmup_prefix=False`, which the published recipe runs once an epoch.
    """
    peak, least, first = config.learning_rate, config.min_learning_rate, config.warmup_learning_rate

    def schedule(step):
        epoch = step // steps_per_epoch if config.change_every == "epoch" else step / steps_per_epoch
        rising = first + (peak - first) * epoch / max(config.warmup_epochs, 1e-9)
        falling = least + 0.5 * (peak - least) * (1 + jnp.cos(jnp.pi * jnp.minimum(epoch / epochs, 1)))
        falling = peak if OPTIMIZERS[config.name].schedule_free else falling
        return jnp.where(epoch < config.warmup_epochs, rising, falling)

    return schedule


def layer_scales(params: dict, decay: float) -> dict:
    """Factor of each parameter's learning rate: 1 at the head, `decay` times less with every block towards the words.

    Source: BEiT (arXiv 2106.08254), as timm's `--layer-decay` has it.
    """
    stages = params.get("stages", {0: params})
    depths = [len(stages[stage]["blocks"]) for stage in range(len(stages))]
    depth = sum(depths)

    def scale(path, leaf) -> float:
        keys = [entry.key for entry in path]
        stage = keys[1] if keys[0] in ("stages", "aggregations") else 0
        # What a stage's blocks share, and the way from it to the next one, belong to its first and to its last block.
        layer = depth + 1 if keys[0] in ("norm", "decoder", "head") else 0
        if "blocks" in keys:
            layer = 1 + sum(depths[:stage]) + keys[keys.index("blocks") + 1]
        elif keys[0] == "stages":
            layer = 1 + sum(depths[:stage])
        elif keys[0] == "aggregations":
            layer = sum(depths[: stage + 1])
        return decay ** (depth + 1 - layer)

    return jax.tree_util.tree_map_with_path(scale, params)


def decay_mask(params: dict) -> dict:
    """True where weight decay applies: everything but vectors (norms, biases), positions and the class token."""

    def decays(path, leaf) -> bool:
        return leaf.ndim > 1 and path[-1].key not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def muon_dimensions(params: dict) -> dict:
    """The axes that Muon takes as a matrix, inputs and outputs: of linear maps and convolutions but for the first and
    the last layers. None for what AdamW moves: vectors, positions, the class token, the words' embedding, and what
    gives classes or boxes."""

    def dimensions(path, leaf) -> optax.contrib.MuonDimensionNumbers | None:
        *layer, name = (str(entry.key) for entry in path)
        if name != "kernel" or layer[0] in ("word_embedding", "stem") or ".".join(layer) in LAST_LAYERS:
            return None
        *inputs, output = range(leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), output)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Steps as long as AdamW's, so that its learning rate fits both."""
    muon = optax.contrib.muon(
        1.0,
        beta=config.beta1,
        eps=config.epsilon,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
    )
    rules = {
        "muon": optax.chain(muon, optax.scale(-1.0)),  # a whole optimizer, whose steps go down
        "adamw": optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    }

    def labels(params: dict) -> dict:
        axes = muon_dimensions(params)
        return jax.tree.map(lambda leaf, found: "adamw" if found is None else "muon", params, axes)

    return optax.partition(rules, labels)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A line of the table: how gradients become a direction, which is followed by weight decay and learning rate."""

    direction: Callable[[OptimizerConfig], optax.GradientTransformation]
    trust_ratio: bool = False
    """The step of what decays is as long, in proportion, as its weights."""
    schedule_free: bool = False
    """The learning rate stays at its peak, and the optimizer itself averages the weights."""


OPTIMIZERS = {
    "adamw": Optimizer(lambda config: optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)),
    "nadamw": Optimizer(lambda config: optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, nesterov=True)),
    "lamb": Optimizer(lambda config: optax.scale_by_adam(config.beta1, config.beta2, config.epsilon), trust_ratio=True),
    "lion": Optimizer(lambda config: optax.scale_by_lion(config.beta1, config.beta2)),
    "sgd": Optimizer(lambda config: optax.trace(config.beta1)),
    "muon": Optimizer(_muon),
    # Its average stands in the place of the first moment.
    "schedule_free": Optimizer(
        lambda config: optax.scale_by_adam(0.0, config.beta2, config.epsilon), schedule_free=True
    ),
}
"""Sources: AdamW arXiv 1711.05101, NAdam openreview OM0jvwB8jIp57ZJjtNEZ, LAMB arXiv 1904.00962, Lion arXiv 2302.06675,
Muon arXiv 2502.16982, schedule-free AdamW arXiv 2405.15682."""


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, freeze: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Gradients to updates: clipping, direction, decay, learning rate.

    Decay is PyTorch's AdamW's for all optimizers: beside the step, and scaled by the learning rate. What is frozen has
    no update and no state.
    """
    rule = OPTIMIZERS[config.name]
    steps = [rule.direction(config), optax.add_decayed_weights(config.weight_decay, decay_mask)]
    if rule.trust_ratio:
        steps.append(optax.masked(optax.scale_by_trust_ratio(), decay_mask))
    made = optax.chain(*steps, optax.scale_by_learning_rate(schedule))
    outer = []
    if config.clip_norm is not None:
        outer.append(optax.clip_by_global_norm(config.clip_norm))
    if config.clip_ratio is not None:
        outer.append(optax.adaptive_grad_clip(config.clip_ratio))
    if config.layer_decay < 1:

        def scale_layers(updates, params):
            return jax.tree.map(lambda update, scale: update * scale, updates, layer_scales(params, config.layer_decay))

        made = optax.chain(made, optax.stateless(scale_layers))
    if rule.schedule_free:
        made = optax.contrib.schedule_free(made, schedule, b1=config.beta1)
    made = optax.chain(*outer, made) if outer else made
    if not freeze:
        return made

    def is_free(params: dict) -> dict:
        return jax.tree.map(operator.not_, frozen_mask(params, freeze))

    # The gradients of what is frozen are 0.
    return optax.masked(made, is_free)


def average_of_weights(
    config: OptimizerConfig, update: jax.Array, ema: dict, params: dict, opt_state: optax.OptState, statistics: dict
) -> dict:
    """The average of weights after the `update`-th update (from 1), which gave `params` and `opt_state`.

    Args:
        statistics: the running averages of batch norm among `params`, which no optimizer moves.
    """
    if OPTIMIZERS[config.name].schedule_free:
        state = optax.tree.get(opt_state, "ScheduleFreeState")

        def averaged(fast: jax.Array | optax.MaskedNode, param: jax.Array) -> jax.Array:
            frozen = isinstance(fast, optax.MaskedNode)
            return param if frozen else optax.contrib.schedule_free_eval_params(state._replace(z=fast), param)

        is_frozen = {"is_leaf": lambda leaf: isinstance(leaf, optax.MaskedNode)}
        return overwritten(jax.tree.map(averaged, state.z, params, **is_frozen), statistics)
    decay = ema_decay(config, update)
    return jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, ema, params)


def ema_decay(config: OptimizerConfig, update: jax.Array) -> jax.Array:
    """Decay of the average of weights at its `update`-th update (from 1).

    A constant decay near one leaves the average of a short run at its random initial weights.
    """
    warmed_up = jnp.float32(config.ema_decay)
    return jnp.minimum(warmed_up, (1 + update) / (10 + update)) if config.ema_warmup else warmed_up
