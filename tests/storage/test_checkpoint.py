"""What a checkpoint gives back, on which devices, and that no damage goes unseen."""

import contextlib
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from jax.sharding import SingleDeviceSharding

from tnt_jax.storage.checkpoint import Checkpoints
from tnt_jax.storage.packing import LEAST_ALONE, pack
from tnt_jax.training.loop import saved_trees
from tnt_jax.training.mesh import make_mesh, shardings_of
from tnt_jax.training.step import TrainState

SCORES = {"ema_top1": 0.5, "count": 360, "ema_loss": float("nan")}


def state_of(seed: int) -> TrainState:
    """Arrays that are packed and one that is not, of three dtypes, one of them without axes."""

    def params(seed: int) -> dict:
        random = np.random.default_rng(seed)
        return {
            "blocks": {i: {"kernel": jnp.float32(random.normal(size=(48, 512)))} for i in range(3)},
            "head": {"kernel": jnp.float32(random.normal(size=(256, 256))), "bias": jnp.float32(random.normal(size=7))},
        }

    half = jax.tree.map(jnp.bfloat16, params(seed + 2))
    return TrainState(jnp.int32(3), params(seed), params(seed + 1), (jnp.int32(5), half))


def like(state: TrainState, mesh) -> TrainState:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings_of(state, mesh),
    )


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with the checkpoints of two steps, and the states that were saved."""
    folder, states = tmp_path_factory.mktemp("saved"), {1: state_of(1), 2: state_of(10)}
    with contextlib.closing(Checkpoints(folder, keep=2)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, saved_trees(state), SCORES)
    return folder, states


def test_small_arrays_are_few_and_large_ones_are_alone():
    assert LEAST_ALONE == 256 * 256
    packed = pack(state_of(0).opt_state)
    assert {name: array.shape for name, array in packed.items()} == {
        "int32": (1,),
        "bfloat16": (3 * 48 * 512 + 7,),
        "1.head.kernel": (256, 256),
    }


def test_each_item_is_restored_alone_onto_one_device(saved):
    folder, states = saved
    here = SingleDeviceSharding(jax.devices()[0])
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        for name, tree in saved_trees(states[2]).items():
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
            assert_equal(checkpoints.restore(2, {name: shapes})[name], tree)


def test_latest_and_best_are_kept(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step, score in enumerate((0.1, 0.9, 0.3, None, 0.2), start=1):
            checkpoints.save(step, saved_trees(state_of(step)), score and {"ema_top1": score})
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best_step, checkpoints.latest_step) == ([2, 4, 5], 2, 5)


def test_another_tree_of_the_same_size_is_refused(saved):
    folder, states = saved
    params = dict(states[2].params)
    params["neck"] = params.pop("head")
    wanted = like(TrainState(jnp.int32(0), params, params, ()), make_mesh(devices=jax.devices()[:1]))
    with (
        contextlib.closing(Checkpoints(folder)) as checkpoints,
        pytest.raises(InputError, match="params is of another model"),
    ):
        checkpoints.restore(2, {"params": wanted.params})


@pytest.mark.parametrize("damage", ["a byte flipped", "cut off", "gone"])
def test_no_damage_to_any_file_goes_unseen(damage, saved, tmp_path):
    folder, states = saved
    wanted = like(states[2], make_mesh(devices=jax.devices()[:1]))
    files = sorted(path.relative_to(folder) for path in (folder / "checkpoints/2").rglob("*") if path.is_file())
    seen = {}
    for file in files:
        run_dir = tmp_path / file.name
        shutil.copytree(folder, run_dir)
        content = bytearray((run_dir / file).read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "gone":
            (run_dir / file).unlink()
        else:
            (run_dir / file).write_bytes(content if damage == "a byte flipped" else content[: len(content) // 2])
        messages = []
        with contextlib.closing(Checkpoints(run_dir, warn=messages.append)) as checkpoints:
            found, restored = checkpoints.restore_latest(saved_trees(wanted))
        seen[file] = bool(messages)
        step = 1 if messages else 2
        assert found == step
        assert_equal(restored, saved_trees(states[step]))
        assert all("the checkpoint of step 2" in message and "Going back to step 1" in message for message in messages)
        shutil.rmtree(run_dir)
    largest = max(files, key=lambda file: (folder / file).stat().st_size)
    assert seen[largest]


# In a process of its own, which has four devices.
ON_OTHER_DEVICES = """
import contextlib, itertools, sys
import jax
from test_checkpoint import SCORES, assert_equal, like, state_of
from tnt_jax.storage.checkpoint import Checkpoints
from tnt_jax.training.loop import saved_trees
from tnt_jax.training.mesh import make_mesh

assert jax.device_count() == 4
meshes = [make_mesh(fsdp, jax.devices()[:count]) for count, fsdp in ((1, 1), (4, 1), (4, 2), (4, 4), (2, 2))]
state = state_of(0)
with contextlib.closing(Checkpoints(sys.argv[1], keep=len(meshes))) as checkpoints:
    for step, mesh in enumerate(meshes):
        placed = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), state, like(state, mesh))
        checkpoints.save(step, saved_trees(placed), SCORES)
    checkpoints.wait()
    for step, mesh in itertools.product(range(len(meshes)), meshes):
        wanted = like(state, mesh)
        restored = checkpoints.restore(step, saved_trees(wanted))
        assert_equal(restored, saved_trees(state))
        for found, leaf in zip(jax.tree.leaves(restored), jax.tree.leaves(saved_trees(wanted)), strict=True):
            assert found.sharding == leaf.sharding, (step, found.sharding, leaf.sharding)
"""


def test_saved_and_restored_on_any_devices_whole_or_in_shards(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/storage'}"
    done = subprocess.run(
        [sys.executable, "-c", ON_OTHER_DEVICES, tmp_path],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
