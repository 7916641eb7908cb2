"""A run from its configuration to its last step."""

import contextlib
import os
import time
from collections.abc import Iterator

import jax
import numpy as np
import rich.console
from flax import nnx

from tnt_jax.config import ModelChanges, TrainConfig, check
from tnt_jax.data.pipeline import Batch, eval_batches, steps_per_epoch, train_batches
from tnt_jax.data.sources import open_source
from tnt_jax.models.adapting import adapt
from tnt_jax.models.variants import abstract_model, build_model, complete, resolve
from tnt_jax.storage.checkpoint import Checkpoints, WriteError, claim_run_dir
from tnt_jax.storage.folder import model_from_parameters, model_parameters
from tnt_jax.storage.load import load_model
from tnt_jax.training.agreement import facts
from tnt_jax.training.memory import keep_memory
from tnt_jax.training.mesh import check_batch_size, make_mesh, to_devices
from tnt_jax.training.processes import together
from tnt_jax.training.program import Program
from tnt_jax.training.report import NonFiniteLossError, Report, check_wandb
from tnt_jax.training.step import TrainState, evaluate
from tnt_jax.training.stopping import StoppedError, StopSignal, stop_request


def train(config: TrainConfig[ModelChanges]) -> dict[str, float]:
    """Trains from where the run's folder stands to the last step.

    Returns:
        The scores of the last step: count, and top1, top5 (shares of 1) and loss for the averaged weights (`ema_`) and
        for the raw ones (`raw_`).

    Raises:
        InputError: something in the configuration is wrong. Raised before anything is written.
        NonFiniteLossError: the loss was infinite or not a number. The last checkpoint before it is kept.
        WriteError: the run's folder cannot be written any more. No checkpoint that was written to its end is harmed.
        StoppedError: Ctrl-C or SIGTERM. The step that was under way is finished and saved first.
        PeersError: not all processes of the run came.
    """
    began = time.perf_counter()
    keep_memory()
    with together(config.distributed, facts(config)):
        use_compilation_cache()
        console = rich.console.Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0)
        run = Run(config)
        claim_run_dir(run.config, run.train_source.class_names)
        with contextlib.closing(
            Checkpoints(config.run_dir, keep=config.keep_checkpoints, warn=console.print)
        ) as checkpoints:
            state = run.saved_state(checkpoints) or run.initial_state()
            start = int(state.step)
            if start == run.total_steps:
                console.print(f"The run in {config.run_dir} is finished. Another --run-dir starts another one.")
            else:
                console.print(run.describe(start))
                _train_from(start, state, run, checkpoints, console, began)
            return _conclude(checkpoints, run, console)


def use_compilation_cache() -> None:
    """Keeps what is compiled for the next start, in the user's cache unless JAX_COMPILATION_CACHE_DIR says where."""
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "tnt_jax", "compiled"))


def _train_from(
    start: int, state: TrainState, run: "Run", checkpoints: Checkpoints, console: rich.console.Console, began: float
) -> None:
    try:
        with (
            Report(run.config, console, start, run.total_steps, run.steps_per_epoch, began) as report,
            contextlib.closing(run.batches(start)) as batches,
            stop_request(console) as stop_signal,
        ):
            _take_steps(run, state, batches, checkpoints, report, stop_signal)
            checkpoints.wait()
    except (NonFiniteLossError, WriteError) as error:
        step = checkpoints.latest_step
        last = "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
        raise type(error)(f"{error}; {last}") from error.__cause__


def _take_steps(
    run: "Run",
    state: TrainState,
    batches: Iterator[Batch],
    checkpoints: Checkpoints,
    report: Report,
    stop_signal: StopSignal,
) -> None:
    for step in range(int(state.step) + 1, run.total_steps + 1):
        state, metrics = run.train_step(state, next(batches))
        report.train(step, metrics)
        checkpoints.check()
        evaluates = step % run.steps_between_evaluations == 0 or step == run.total_steps
        signal_number = stop_signal(step)
        if not (evaluates or signal_number):
            continue
        # Nothing of a step is saved before its loss is known to be finite.
        report.flush()
        scores = run.evaluate(state) if evaluates else None
        if scores:
            report.test(step, scores)
        checkpoints.save(step, saved_trees(state), scores)
        if signal_number and step < run.total_steps:
            checkpoints.wait()
            raise StoppedError(
                f"stopped after step {step} of {run.total_steps}, which is saved; the same command goes on from there",
                signal_number,
            )


def saved_trees(state: TrainState) -> dict[str, dict]:
    """What a checkpoint holds of a state, beside its step."""
    return {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}


class Run:
    """What a configuration determines and no step changes: data, devices, and the functions of a step.

    Raises:
        InputError: something in the configuration is wrong.
    """

    def __init__(self, config: TrainConfig[ModelChanges]):
        data = config.data
        check(config)
        resolve(config.model)
        check_wandb(config)
        self.train_source, self.test_source = (
            open_source(data.source, split) for split in (data.train_split, data.eval_split)
        )
        self.config = complete(config, len(self.train_source.class_names))
        self.mesh = make_mesh(config.fsdp)
        check_batch_size(config.batch_size, self.mesh, config.accumulation_steps)
        self.steps_per_epoch = steps_per_epoch(len(self.train_source), data, config.batch_size)
        self.total_steps = (config.epochs + config.optimizer.cooldown_epochs) * self.steps_per_epoch
        self.steps_between_evaluations = config.eval_every_epochs * self.steps_per_epoch
        self.program = Program(self.config, self.mesh, self.steps_per_epoch)
        self._feed = {
            "image_size": self.config.model.image_size,
            "channels": self.config.model.in_channels,
            "batch_size": config.batch_size,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }

    def saved_state(self, checkpoints: Checkpoints) -> TrainState | None:
        """The newest sound state, on all devices; None before the first checkpoint."""
        abstract = self.program.abstract_state
        if saved := checkpoints.restore_latest(saved_trees(abstract)):
            step, trees = saved
            return TrainState(step=jax.device_put(np.int32(step), abstract.step.sharding), **trees)
        return None

    def initial_state(self) -> TrainState:
        """The state before the first step, on all devices."""
        # Made op by op and then placed: to compile the whole initialisation takes longer than the first step.
        if self.config.init_from:
            model = load_model(self.config.init_from)
            wanted = self.config.model
            parameters, _ = adapt(model_parameters(model), model.config, wanted, seed=self.config.seed)
            model = model_from_parameters(wanted, parameters)
        else:
            model = build_model(self.config.model, self.config.seed)
        params = nnx.to_pure_dict(nnx.state(model))
        return self.program.init(jax.tree.map(np.asarray, params))

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step on all devices. The memory of `state` is used again: it cannot be read afterwards."""
        return self.program.train_step(state, to_devices(batch, self.mesh))

    def batches(self, start: int) -> Iterator[Batch]:
        """Training batches after `start` steps."""
        return train_batches(self.train_source, self.config.data, **self._feed, seed=self.config.seed, start_step=start)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Scores on every test image, of the averaged and of the raw weights."""
        scores = {}
        for weights, params in (("ema", state.ema), ("raw", state.params)):
            batches = eval_batches(self.test_source, self.config.data, **self._feed)
            part = evaluate(self.program.eval_step, params, batches, self.mesh)
            scores["count"] = part.pop("count")
            scores |= {f"{weights}_{name}": value for name, value in part.items()}
        return scores

    def describe(self, start: int) -> str:
        """The run in a sentence or two, for people."""
        model = self.config.model
        parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(model)))
        device = jax.devices()[0]
        verb = "Going on with" if start else "Training"
        return (
            f"{verb} {model.name}: {model.depth} blocks, words {model.inner_dim} and sentences {model.outer_dim} wide, "
            f"{parameters:,} parameters, on {jax.device_count()} {device.device_kind} device(s), "
            f"from step {start} to {self.total_steps}. {len(self.train_source):,} training and "
            f"{len(self.test_source):,} test images of {len(self.train_source.class_names)} classes. "
            f"Everything of the run lies in {self.config.run_dir}"
        )


def _conclude(checkpoints: Checkpoints, run: Run, console: rich.console.Console) -> dict[str, float]:
    scores, best = checkpoints.scores(run.total_steps), checkpoints.best_step
    folder = run.config.run_dir
    console.print(
        f"test accuracy {scores['ema_top1']:.2%} with averaged weights, {scores['raw_top1']:.2%} with raw ones, over "
        f"{scores['count']:,} images (best: {checkpoints.scores(best)['ema_top1']:.2%} after epoch "
        f"{best / run.steps_per_epoch:.4g})\nThe run lies in {folder}. Next:\n"
        f"  python eval.py {folder}\n  python predict.py {folder} IMAGE"
    )
    return scores
