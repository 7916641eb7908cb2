"""Accuracy over every image exactly once."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.mixing import Feeding, normalise
from tnt_jax.data.pipeline import eval_batches
from tnt_jax.data.sources import open_source
from tnt_jax.inference import load_model
from tnt_jax.models.saving import description_of
from tnt_jax.training.checkpoint import is_run, read_config
from tnt_jax.training.mesh import check_batch_size, make_mesh, to_devices


def make_eval_step(graphdef: nnx.GraphDef, feeding: Feeding) -> Callable[[dict, dict], dict]:
    """The jitted function (params, batch) -> sums over the images that the batch's mask marks as real.

    The sums: count, top1 and top5 (right answers), loss (cross-entropy).
    """

    @jax.jit
    def eval_step(params: dict, batch: dict) -> dict:
        logits = nnx.merge(graphdef, params)(normalise(batch["image"], feeding)).astype(jnp.float32)
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


def evaluate_model(path: str, source: str | None = None, *, batch_size: int = 64) -> Iterator[tuple[str, dict]]:
    """Evaluates what lies in a folder: the averaged and the raw weights of a training run, or the one set of a model.

    Args:
        source: as in `DataConfig.source`; None takes that of the training run.

    Yields:
        What the weights are, and their scores as `evaluate` gives them.

    Raises:
        InputError: there is no such model, no source is known, or its classes are not those of the model.
    """
    data = read_config(path).data if is_run(path) else None
    if data is None and source is None:
        raise InputError(f"{path} is not a training run, so --source must say what to evaluate it on")
    if source is not None:
        data = DataConfig(source)
    mesh = make_mesh()
    check_batch_size(batch_size, mesh)
    images = open_source(data.source, data.eval_split)
    for weights in ("ema", "raw") if is_run(path) else ("ema",):
        model = load_model(path, weights=weights)
        feeding, config = description_of(model).preprocessing, model.config
        if len(images.class_names) != config.num_classes:
            raise InputError(
                f"{path} has {config.num_classes} classes, and {data.source} has {len(images.class_names)}"
            )
        data = dataclasses.replace(data, crop=feeding.crop)
        batches = eval_batches(
            images, data, image_size=config.image_size, channels=config.in_channels, batch_size=batch_size
        )
        graphdef, params = nnx.split(model)
        scores = evaluate(make_eval_step(graphdef, feeding), nnx.to_pure_dict(params), batches, mesh)
        yield ({"ema": "averaged", "raw": "raw"}[weights] if is_run(path) else "as loaded"), scores
