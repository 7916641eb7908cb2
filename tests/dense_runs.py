"""Small runs on scenes of digits, for the tasks whose labels move with the pixels of their image."""

import dataclasses
import os
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import check_program, history

import tnt_jax
from benchmarks.scenes import write
from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig
from tnt_jax.models.variants import build_model, complete
from tnt_jax.training.loop import train
from tnt_jax.training.mesh import make_mesh, to_devices
from tnt_jax.training.program import Program

FEW = {"train": 48, "val": 10, "test": 10}
SMALL = ModelChanges(
    "tnt_ti_patch16_224",
    image_size=64,
    in_channels=1,
    depth=2,
    inner_dim=4,
    inner_heads=2,
    outer_dim=32,
    outer_heads=2,
    drop_path_rate=0.1,
)
SMALL_PYRAMID = ModelChanges(
    "ptnt_ti_patch16_192",
    image_size=64,
    in_channels=1,
    depth=(1, 1, 1, 1),
    inner_dim=(2, 4, 4, 4),
    inner_heads=(1, 2, 2, 2),
    outer_dim=(8, 12, 16, 16),
    outer_heads=(2, 2, 2, 2),
)


def write_few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "few"
    write(folder, FEW)
    return folder


def run_of(folder, source, task, model, moves, **changes):
    """A run of six steps."""
    config = TrainConfig(
        run_dir=str(folder),
        model=model,
        data=DataConfig.plain(source, task=task, label_smoothing=0.0, random_shift=0.1, **moves),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_epochs=1, ema_decay=0.9),
        batch_size=16,
        epochs=2,
    )
    return dataclasses.replace(config, **changes)


def states(run_dir):
    return jax.tree.leaves(nnx.state(tnt_jax.load_model(run_dir, weights="raw", step=6)))


def assert_goes_on_exactly(finished, folder):
    """A run that is stopped after four of its six steps ends as one that was not."""
    again = dataclasses.replace(finished, run_dir=str(folder))
    train(again, on_step=lambda step, _: step == 4)
    train(again)
    for ours, theirs in zip(states(again.run_dir), states(finished.run_dir), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return again


def outputs_when_saved_again(run_dir, folder):
    """The outputs of a run's model, which are those of the model that is saved and loaded."""
    model = tnt_jax.load_model(run_dir)
    tnt_jax.save_model(model, folder)
    again = tnt_jax.load_model(folder)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 1)), jnp.float32)
    ours, theirs = (nnx.jit(lambda model: model(images))(each) for each in (model, again))
    np.testing.assert_array_equal(ours, theirs)
    assert again.description == model.description
    return ours


def step_of(config, classes, images, labels, devices):
    """Loss and parameters after a step on so many devices."""
    config, mesh = complete(config, classes), make_mesh(devices=jax.devices()[:devices])
    program = Program(config, mesh, 3)
    check_program(program)
    state = program.init(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(build_model(config.model, 0)))))
    state, metrics = program.train_step(state, to_devices({"image": images[..., None], "label": labels}, mesh))
    return float(metrics["loss"]), state.params


def assert_same_step(one, other):
    (loss, params), (of_other, others) = one, other
    assert loss == pytest.approx(of_other, rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def run(script, *arguments):
    code, out, err = commands.run(script, *arguments)
    assert code == 0, err
    return out


def learned(name, source, run_dir, *arguments):
    """The last scores of `configs/NAME.py` on scenes whose digits were never trained on, as its user runs it."""
    command = [sys.executable, "train.py", "--config", name, "--data.source", source, "--run-dir", run_dir, *arguments]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": ""}
    subprocess.run(list(map(str, command)), cwd=commands.ROOT, env=environment, check=True, capture_output=True)
    return history(run_dir)[-1]
