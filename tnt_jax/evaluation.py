"""Accuracy over every image exactly once."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tnt_jax.config import DataConfig
from tnt_jax.data.mixing import normalise
from tnt_jax.training.mesh import to_devices


def make_eval_step(graphdef: nnx.GraphDef, data: DataConfig) -> Callable[[dict, dict], dict]:
    """The jitted function (params, batch) -> sums over the images that the batch's mask marks as real.

    The sums: count, top1 and top5 (right answers), loss (cross-entropy).
    """

    @jax.jit
    def eval_step(params: dict, batch: dict) -> dict:
        logits = nnx.merge(graphdef, params)(normalise(batch["image"], data)).astype(jnp.float32)
        labels, mask = batch["label"], batch["mask"]
        _, likeliest = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        right = likeliest == labels[:, None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        values = {"count": jnp.ones_like(loss), "top1": right[:, 0], "top5": right.any(-1), "loss": loss}
        return {name: jnp.where(mask, value, 0).sum() for name, value in values.items()}

    return eval_step


def evaluate(eval_step: Callable, params: dict, batches: Iterable[dict], mesh: Mesh) -> dict[str, float]:
    """Scores of `params`: count (images seen), top1 and top5 (shares of 1), loss (mean)."""
    totals = None
    for batch in batches:
        sums = eval_step(params, to_devices(batch, mesh))
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    totals = {name: float(total) for name, total in totals.items()}
    count = totals.pop("count")
    return {"count": int(count)} | {name: total / count for name, total in totals.items()}
