"""Learning rate, AdamW, and which parameters decay."""

import jax
import jax.numpy as jnp
import optax

from tnt_jax.config import OptimizerConfig

NOT_DECAYED = {"class_token", "word_positions", "sentence_positions"}


def learning_rate_schedule(config: OptimizerConfig, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Step (from 0) to learning rate: a line up, which replaces the first part of a cosine over `epochs`, then its end.

    Source: timm 0.3's CosineLRScheduler with `warmup_prefix=False`, which the published recipe runs once an epoch.
    """
    peak, least, first = config.learning_rate, config.min_learning_rate, config.warmup_learning_rate

    def schedule(step):
        epoch = step // steps_per_epoch if config.change_every == "epoch" else step / steps_per_epoch
        rising = first + (peak - first) * epoch / max(config.warmup_epochs, 1e-9)
        falling = least + 0.5 * (peak - least) * (1 + jnp.cos(jnp.pi * jnp.minimum(epoch / epochs, 1)))
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
        layer = depth + 1 if keys[0] in ("norm", "head") else 0
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


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW as PyTorch defines it: decay is scaled by the learning rate and applied beside the adaptive step."""
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.layer_decay == 1:
        return adamw

    def scale_layers(updates, params):
        return jax.tree.map(lambda update, scale: update * scale, updates, layer_scales(params, config.layer_decay))

    return optax.chain(adamw, optax.stateless(scale_layers))


def ema_decay(config: OptimizerConfig, update: jax.Array) -> jax.Array:
    """Decay of the average of weights at its `update`-th update (from 1).

    A constant decay near one leaves the average of a short run at its random initial weights.
    """
    warmed_up = jnp.float32(config.ema_decay)
    return jnp.minimum(warmed_up, (1 + update) / (10 + update)) if config.ema_warmup else warmed_up
