"""What lies in a run's folder: its configuration, and checkpoints that are written while training goes on."""

import contextlib
import json
import os
import pathlib
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from tnt_jax.config import InputError, TrainConfig, from_json, to_json
from tnt_jax.models.saving import ModelDescription, Preprocessing, describe, read_description, write_description
from tnt_jax.models.tnt import TNT
from tnt_jax.models.variants import abstract_model
from tnt_jax.training.step import TrainState

CONFIG_FILE = "config.json"
BEST_METRIC = "ema_top1"


def read_config(run_dir: str | os.PathLike) -> TrainConfig:
    """The configuration of the run in this folder.

    Raises:
        InputError: the folder holds no run.
    """
    path = pathlib.Path(run_dir) / CONFIG_FILE
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise InputError(f"{run_dir} is not the folder of a run: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as the configuration of a run: {error}") from error


def is_run(path: str | os.PathLike) -> bool:
    """Whether a training run lies in this folder."""
    return (pathlib.Path(path) / CONFIG_FILE).is_file()


def claim_run_dir(config: TrainConfig, class_names: Sequence[str]) -> None:
    """Writes what the run is into its folder, or makes sure that the run that lies there has the same configuration.

    Raises:
        InputError: the folder cannot be written, holds something else, or holds a run of another configuration.
    """
    folder = pathlib.Path(config.run_dir)
    if folder.is_dir() and any(folder.iterdir()):
        there = _flat(to_json(read_config(config.run_dir)))
        wanted = _flat(to_json(config))
        changed = [f"{name} {there[name]!r} (now {wanted[name]!r})" for name in wanted if there[name] != wanted[name]]
        # The folder may have been moved or named in another way.
        changed = [change for change in changed if not change.startswith("run_dir ")]
        if changed:
            raise InputError(
                f"{folder} holds a run of another configuration: {', '.join(changed)}. "
                "Go on with the same one, or choose another folder with --run-dir"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_description(folder, _description(config, class_names))
        (folder / CONFIG_FILE).write_text(json.dumps(to_json(config), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write into the run's folder {folder}: {error.strerror}") from error


def _description(config: TrainConfig, class_names: Sequence[str]) -> ModelDescription:
    model, data = config.model, config.data
    mean, std = ((value,) * model.in_channels for value in (data.mean, data.std))
    return describe(
        model,
        class_names=class_names,
        source={"run": config.run_dir, "data": data.source},
        preprocessing=Preprocessing(model.image_size, data.crop, mean, std),
    )


def load_run(run_dir: str | os.PathLike, *, weights: str = "ema", step: int | None = None) -> TNT:
    """The model of a training run; see `tnt_jax.load_model`.

    Raises:
        InputError: the run has no checkpoint yet, or none of this step.
    """
    description = read_description(run_dir)
    graphdef, state = nnx.split(abstract_model(description.config))
    with contextlib.closing(Checkpoints(run_dir)) as checkpoints:
        step = checkpoints.best_step or checkpoints.latest_step if step is None else step
        if step not in checkpoints.steps:
            kept = f"it has {checkpoints.steps}" if checkpoints.steps else "it has none yet"
            raise InputError(f"the run in {run_dir} has no checkpoint of step {step}; {kept}")
        params = checkpoints.restore_params(step, nnx.to_pure_dict(state), item={"raw": "params"}.get(weights, weights))
    model = nnx.merge(graphdef, params)
    model.description = description
    return model


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Checkpoints:
    """The checkpoints of a run.

    The latest few and the best one, each with parameters, their average and the optimizer.
    """

    def __init__(self, run_dir: str, *, keep: int = 1):
        policies = checkpoint_managers.preservation_policy
        self._manager = ocp.CheckpointManager(
            pathlib.Path(run_dir).resolve() / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                # best_fn makes best_step() the best; alone, it would also throw the newest away.
                best_fn=_score,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                enable_async_checkpointing=True,
            ),
            item_names=("params", "ema", "opt_state"),
        )

    @property
    def steps(self) -> list[int]:
        """The steps that are kept."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest step that was written to its end, None before the first."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the highest test accuracy of the averaged weights, None where nothing was evaluated."""
        return self._manager.best_step()

    def save(self, step: int, state: TrainState, scores: dict[str, float] | None) -> None:
        """Begins to write a checkpoint; `scores` are those of this step, if it was evaluated."""
        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in ("params", "ema", "opt_state")}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=scores)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, with the shapes and shardings of `like`."""
        targets = {name: jax.tree.map(ocp.utils.to_shape_dtype_struct, getattr(like, name)) for name in vars(like)}
        step_target = targets.pop("step")
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(**{name: ocp.args.StandardRestore(target) for name, target in targets.items()}),
        )
        return TrainState(step=jax.device_put(jax.numpy.int32(step), step_target.sharding), **items)

    def restore_params(self, step: int, like: dict, *, item: str = "ema") -> dict:
        """The parameters of a step, or their average, with the shapes of `like`."""
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))[item]

    def scores(self, step: int) -> dict[str, float]:
        """The scores that were saved with a step."""
        return self._manager.metrics(step)

    def wait(self) -> None:
        """Waits until everything is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on the disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _score(scores: dict[str, float]) -> float:
    return scores[BEST_METRIC]
