"""A run of a few seconds, and what it leaves in its folder."""

import dataclasses
import json
import pathlib
import socket

import jax
from flax import nnx

import tnt_jax
from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig
from tnt_jax.storage.description import to_json
from tnt_jax.storage.places import place

TINY = ModelChanges(
    "tnt_ti_patch16_224",
    image_size=16,
    in_channels=1,
    patch_size=8,
    word_stride=4,
    depth=1,
    inner_dim=4,
    inner_heads=2,
    outer_dim=12,
    outer_heads=2,
    drop_path_rate=0.1,
)


def tiny_run(run_dir, **changes) -> TrainConfig:
    """Three epochs of eleven steps on digits."""
    config = TrainConfig(
        run_dir=str(run_dir),
        model=TINY,
        data=DataConfig.plain("digits", random_shift=0.1),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_epochs=1),
        batch_size=128,
        epochs=3,
        log_every_steps=4,
    )
    return dataclasses.replace(config, **changes)


def metrics_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (place(run_dir) / "metrics.jsonl").read_text().splitlines()]


def parameters(run_dir, **choice):
    return jax.tree.leaves(nnx.state(tnt_jax.load_model(run_dir, **choice)))


def config_file(folder) -> str:
    """The path of a file with `tiny_run`."""
    path = folder / "config.py"
    path.write_text(
        "from tnt_jax.config import ModelChanges, TrainConfig\nfrom tnt_jax.storage.description import from_json\n"
        f"get_config = lambda: from_json({to_json(tiny_run('unused'))!r}, TrainConfig[ModelChanges])\n"
    )
    return str(path)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def contents(folder, *but):
    files = [path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file() and path.name not in but]
    return {path: path.read_bytes() for path in files}


def history(run_dir):
    return [{name: line[name] for name in line if name != "images_per_second"} for line in metrics_of(run_dir)]


def assert_ended_as(config, finished):
    assert history(config.run_dir) == history(finished.run_dir)
    for weights in ("ema", "raw"):
        pairs = zip(*(parameters(each.run_dir, weights=weights, step=33) for each in (config, finished)), strict=True)
        assert all((ours == theirs).all() for ours, theirs in pairs)


def check_program(program) -> None:
    """Raises TypeError unless a step maps its state to itself: what is saved is then what is restored."""
    state, _ = program.train_step.eval_shape(program.abstract_state, program.abstract_batch)
    before, after = (jax.tree_util.tree_leaves_with_path(each) for each in (program.abstract_state, state))
    if jax.tree.structure(state) != jax.tree.structure(program.abstract_state):
        raise TypeError("a train step changes the structure of its state")
    for (path, leaf), (_, new) in zip(before, after, strict=True):
        if (leaf.shape, leaf.dtype) != (new.shape, new.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise TypeError(f"a train step makes {name} {new.dtype} {new.shape} of {leaf.dtype} {leaf.shape}")
