"""The model of a training run, also while it is being trained. Nothing is written."""

import dataclasses
import os

import jax
from flax import nnx

from tnt_jax.config import InputError, best_metric
from tnt_jax.models.variants import Model, abstract_model
from tnt_jax.storage.description import read_description
from tnt_jax.storage.places import is_bucket
from tnt_jax.storage.reading import DamagedError, best_of, kept_steps, restore, scores_of, steps_of
from tnt_jax.storage.run import read_config
from tnt_jax.tasks.table import TASKS

TREES = {"ema": "ema", "raw": "params"}
ATTEMPTS = 3


def load_run(run_dir: str | os.PathLike, *, weights: str = "ema", step: int | None = None) -> Model:
    """The model of a training run; see `tnt_jax.load_model`.

    Raises:
        InputError: the run has no checkpoint yet, or none of this step; or it is damaged.
        UnreadableError: it cannot be read now.
    """
    description = read_description(run_dir)
    graphdef, state = nnx.split(abstract_model(description.config))
    # Onto one device of this machine, wherever it was trained.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    own = nnx.to_pure_dict(state)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), average_like(own))
    step, trees = _restored(run_dir, step, {TREES[weights]: like})
    params = trees[TREES[weights]]
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), params, own))
    origin = {
        **(description.source or {}),
        "run": os.fspath(run_dir) if is_bucket(run_dir) else os.path.abspath(run_dir),
        "step": step,
        "weights": weights,
        "scores": scores_of(run_dir).get(step),
    }
    model.description = dataclasses.replace(description, source=origin)
    return model


def average_like(params: dict) -> dict:
    """Shapes and dtypes of what a run keeps of parameters, and of their average: float32 or more, for bfloat16 cannot
    hold so small changes."""

    def average(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jax.numpy.promote_types(leaf.dtype, "float32"))

    return jax.tree.map(average, params)


def _restored(run_dir: str | os.PathLike, asked: int | None, like: dict) -> tuple[int, dict]:
    for attempt in range(1, ATTEMPTS + 1):
        steps = steps_of(run_dir)
        step = asked if asked is not None else _best(run_dir, steps) or max(steps, default=None)
        if step is None:
            raise InputError(f"the run in {run_dir} has no checkpoint yet")
        try:
            return step, restore(run_dir, step, like)
        except InputError as error:
            # A run that is being trained removes its old steps.
            gone = step not in steps_of(run_dir)
            if asked is None and gone and attempt < ATTEMPTS:
                continue
            if gone or not isinstance(error, DamagedError):
                raise
            others = [each for each in steps if each != step]
            raise DamagedError(f"{error}; of the run, {kept_steps(run_dir)}" if others else str(error)) from error
    raise AssertionError


def _best(run_dir: str | os.PathLike, steps: list[int]) -> int | None:
    """The best of some steps by the metric that the run's configuration says, or that of its task."""
    try:
        metric = best_metric(read_config(run_dir))
    except InputError:  # it is not there, or of another version
        metric = TASKS[read_description(run_dir).outputs.task].metrics[0].name
    return best_of(steps, scores_of(run_dir), metric)
