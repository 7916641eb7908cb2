"""The objective of a configuration: its task, with weights and what the training labels say."""

from collections.abc import Callable

import numpy as np

from tnt_jax.config import InputError, TrainConfig
from tnt_jax.tasks.losses import Objective
from tnt_jax.tasks.table import TASKS
from tnt_jax.tasks.task import Outputs
from tnt_jax.tasks.weights import BALANCED


def objective_of(config: TrainConfig, labels: Callable[[], np.ndarray] | None = None) -> Objective:
    """The objective of a configuration whose model is complete.

    Args:
        labels: gives those of all training images, checked. It is called only if they are needed. Without it, as for a
            plan, weights are 1 and targets as they are.

    Raises:
        InputError: there are not as many weights as classes.
    """
    task, count = TASKS[config.data.task], config.model.num_classes
    weights: dict[str, np.ndarray] = {}
    for name, balanced in BALANCED.items():
        value = getattr(config.loss, name)
        if value == "balanced" and labels is not None:
            weights[name] = balanced(labels(), count)
        elif isinstance(value, tuple):
            if len(value) != count:
                raise InputError(f"loss.{name} has {len(value)} numbers, and {config.data.source} has {count} outputs")
            weights[name] = np.array(value, np.float64)
    statistics = task.statistics(labels) if labels is not None else {}
    return Objective(task, Outputs(task.name, **statistics), config.loss.name, config.loss.focal_gamma, **weights)
