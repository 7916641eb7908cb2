"""The tasks by name, and what follows of all of them."""

import math
from typing import Any, Literal

from tnt_jax.errors import InputError
from tnt_jax.tasks.detection import Detection
from tnt_jax.tasks.metrics import OTHERS, Metric
from tnt_jax.tasks.multi_label import MultiLabel
from tnt_jax.tasks.regression import Regression
from tnt_jax.tasks.segmentation import Segmentation
from tnt_jax.tasks.single_label import SingleLabel
from tnt_jax.tasks.task import Outputs, Task

_ALL = (SingleLabel(), MultiLabel(), Regression(), Segmentation(), Detection())
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
TaskName = Literal[tuple(TASKS)]
LossName = Literal[tuple(loss for task in TASKS.values() for loss in task.losses)]
METRICS = {metric.name: metric for task in TASKS.values() for metric in task.metrics}
METRICS |= {metric.name: metric for metric in OTHERS}


def metric_of(name: str) -> Metric:
    """The metric of this name, or one that is printed as a plain number."""
    return METRICS.get(name) or Metric(name)


def with_setting(setting: str) -> list[str]:
    """The tasks that can have a setting of a configuration."""
    return [name for name, task in TASKS.items() if setting in task.settings]


def check_one_class(task: str, model: str, flag: str) -> None:
    """Raises InputError unless images of a task have one class each, as a flag needs it."""
    if not TASKS[task].one_class:
        right = " or ".join(name for name, each in TASKS.items() if each.one_class)
        raise InputError(f"the task of {model} is {task}, and {flag} asks for classes: it needs {right}")


def check_outputs(outputs: Outputs, num_classes: int) -> None:
    """Raises InputError unless a model with so many outputs can have such a meaning."""
    if outputs.task not in TASKS:
        raise InputError(f"outputs.task is {outputs.task!r}, and should be one of {', '.join(TASKS)}")
    for name, owner in ((field, task.name) for task in TASKS.values() for field in task.output_fields):
        values = getattr(outputs, name)
        if values is None:
            continue
        sound = isinstance(values, tuple) and all(map(_is_number, values)) and len(values) == num_classes
        if name == "target_std" and sound:
            sound = min(values, default=1) > 0
        if not sound or outputs.task != owner:
            raise InputError(
                f"outputs.{name} is {values}, and a model with task {owner} has one number for each of its "
                f"{num_classes} outputs"
            )
    if (outputs.target_mean is None) != (outputs.target_std is None):
        raise InputError("outputs has one of target_mean and target_std, and should have both or none")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
