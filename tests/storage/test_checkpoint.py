"""What a checkpoint gives back, on which devices, and that no damage goes unseen."""

import contextlib
import errno
import itertools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from jax.sharding import SingleDeviceSharding

from tnt_jax.config import InputError
from tnt_jax.storage import packing, reading
from tnt_jax.storage.checkpoint import Checkpoints, NonFiniteError, WriteError
from tnt_jax.storage.packing import LEAST_ALONE, pack
from tnt_jax.storage.reading import DamagedError, LayoutError, UnreadableError, best_of, restore, scores_of, steps_of
from tnt_jax.training.mesh import make_mesh, shardings_of
from tnt_jax.training.run import saved_trees
from tnt_jax.training.step import TrainState

SCORES = {"ema_top1": 0.5, "count": 360, "ema_loss": 1.5}


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
            checkpoints.save(step, saved_trees(state))
            checkpoints.set_scores(step, SCORES)
    return folder, states


def test_small_arrays_are_few_and_large_ones_are_alone():
    assert LEAST_ALONE == 256 * 256
    packed = pack(state_of(0).opt_state)
    assert {name: array.shape for name, array in packed.items()} == {
        "int32": (1,),
        "bfloat16": (3 * 48 * 512 + 7,),
        "1.head.kernel": (256, 256),
    }


def on_one_device(tree):
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_item_is_restored_alone_onto_one_device_and_reading_changes_nothing(saved):
    folder, states = saved
    before = contents(folder)
    for name, tree in saved_trees(states[2]).items():
        assert_equal(restore(folder, 2, {name: on_one_device(tree)})[name], tree)
    assert contents(folder) == before


def test_latest_and_best_are_kept_and_their_scores(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step, score in enumerate((0.1, 0.9, 0.3, None, 0.2), start=1):
            checkpoints.save(step, saved_trees(state_of(step)))
            if score:
                checkpoints.set_scores(step, {"ema_top1": score})
        checkpoints.wait()
        assert (steps_of(tmp_path), checkpoints.best_step, checkpoints.latest_step) == ([2, 4, 5], 2, 5)
    assert best_of(steps_of(tmp_path), scores_of(tmp_path), "top1") == 2
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"2", "4", "5", "2.files.json", "4.files.json", "5.files.json", "scores.json"}
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(6, saved_trees(state_of(6)))
    assert steps_of(tmp_path) == [2, 6]


@pytest.mark.parametrize("name", ["lr=[1e-3]", "[2026]/run", "a*?"])
def test_the_path_of_a_run_may_look_like_a_pattern(name, saved, tmp_path):
    _, states = saved
    wanted = {"params": on_one_device(states[2].params)}
    with contextlib.closing(Checkpoints(tmp_path / name, keep=2)) as checkpoints:
        checkpoints.save(1, saved_trees(states[1]))
        checkpoints.save(2, saved_trees(states[2]))
    assert_equal(restore(tmp_path / name, 2, wanted)["params"], states[2].params)
    shutil.move(tmp_path / name, tmp_path / "plain")
    with contextlib.closing(Checkpoints(tmp_path / "plain", keep=2)) as checkpoints:
        assert_equal(checkpoints.restore_latest(wanted)[1]["params"], states[2].params)
        checkpoints.save(3, saved_trees(states[1]))
    assert_equal(restore(tmp_path / "plain", 3, wanted)["params"], states[1].params)


@pytest.mark.parametrize("seed", range(3))
def test_the_checksum_sees_numbers_that_are_exchanged(seed):
    numbers = np.random.default_rng(seed).normal(size=(32, 8)).astype(np.float32)
    exchanged = numbers.copy()
    exchanged[3, 1], exchanged[20, 5] = numbers[20, 5], numbers[3, 1]
    reordered, expected = numbers[::-1].copy(), packing.checksums({"a": jnp.asarray(numbers)})
    assert packing.checksums({"a": jnp.asarray(exchanged)}) != expected
    assert packing.checksums({"a": jnp.asarray(reordered)}) != expected
    assert packing.checksums({"a": jnp.asarray(numbers.copy())}) == expected


@pytest.mark.parametrize("place", ["listing", "scores"])
def test_a_stutter_of_the_disk_anywhere_in_reading_is_another_try(place, saved, tmp_path, monkeypatch):
    folder, _ = saved

    def stale(*_, **__):
        raise OSError(116, "Stale file handle")

    if place == "listing":
        monkeypatch.setattr(pathlib.Path, "iterdir", stale)
    else:
        monkeypatch.setattr(pathlib.Path, "read_text", stale)
    reads = {"listing": (steps_of, reading.had_checkpoint), "scores": (scores_of, Checkpoints)}
    for read in reads[place]:
        with pytest.raises(UnreadableError, match=r"cannot be read now .*Stale file handle") as raised:
            read(folder)
        assert raised.value.exit_code == 75


def threads_of_orbax():
    return [thread.name for thread in threading.enumerate() if type(thread).__module__.startswith("orbax")]


def test_a_clock_that_jumps_keeps_no_checkpoint_waiting(tmp_path, monkeypatch):
    truth, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: truth() + 400 * next(looks))
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, saved_trees(state_of(step)))
    assert steps_of(tmp_path) == [1, 2]


def test_a_folder_that_cannot_be_made_keeps_no_thread_waiting(tmp_path, monkeypatch):
    """Nor the process, which could not end for five minutes after its message."""
    make = os.mkdir

    def fail(path, *arguments, **named):
        if os.path.basename(path).startswith("default"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return make(path, *arguments, **named)

    def save_and_wait():
        checkpoints.save(1, saved_trees(state_of(1)))
        checkpoints.wait()

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(os, "mkdir", fail)
    with contextlib.closing(checkpoints), pytest.raises(WriteError, match="Stale file handle") as caught:
        save_and_wait()
    assert caught.value.exit_code == 75
    assert threads_of_orbax() == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), 1),
        (PermissionError(errno.EACCES, "Permission denied"), 1),
        (OSError(errno.EROFS, "Read-only file system"), 1),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (ValueError("UNAVAILABLE: connection reset"), 75),
    ],
)
def test_what_cannot_be_written_is_tried_again_unless_it_would_come_again(error, code, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(WriteError) as raised:
            checkpoints.save(1, saved_trees(state_of(1)))
    assert raised.value.exit_code == code


def changed(states):
    """Trees of the same size that are not those that were saved, and how the message says so."""
    params = dict(states[2].params)
    renamed = {"neck": params["head"], "blocks": params["blocks"]}
    other = {**params, "head": {**params["head"], "bias": jnp.zeros((7,), jnp.bfloat16)}}
    fewer = {"blocks": params["blocks"]}
    return {
        "head.bias is float32 (7,) there and missing here": renamed,
        "head.bias is float32 (7,) there and bfloat16 (7,) here": other,
        "head.kernel is float32 (256, 256) there and missing here": fewer,
    }


@pytest.mark.parametrize("which", range(3))
def test_another_layout_is_refused_and_nothing_is_touched(which, saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path / "run")
    message, params = list(changed(states).items())[which]
    wanted = saved_trees(like(TrainState(jnp.int32(0), params, params, states[2].opt_state), make_mesh()))
    before = contents(tmp_path / "run")
    with (
        contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints,
        pytest.raises(LayoutError, match=r"step 2 .*another layout: in params") as raised,
    ):
        checkpoints.restore_latest(wanted)
    assert message in str(raised.value)
    assert contents(tmp_path / "run") == before


def test_what_counts_as_small_may_change_between_saving_and_reading(saved, monkeypatch):
    folder, states = saved
    monkeypatch.setattr(packing, "LEAST_ALONE", 2**8)
    assert_equal(restore(folder, 2, {"params": on_one_device(states[2].params)})["params"], states[2].params)


ERRORS = {
    "a stale handle": OSError(116, "Stale file handle"),
    "no permission": PermissionError(13, "Permission denied"),
    "a broken disk": OSError(5, "Input/output error"),
    "no memory": MemoryError(),
    "no memory of XLA": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes"),
    "a network": ValueError("UNAVAILABLE: connection reset"),
    "anything else": RuntimeError("a bug in a new release"),
    "a type": TypeError("got an unexpected keyword argument"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_what_cannot_be_read_now_is_not_damaged_and_nothing_is_touched(kind, saved, tmp_path, monkeypatch):
    folder, states = saved
    shutil.copytree(folder, tmp_path / "run")
    before = contents(tmp_path / "run")

    def fail(*arguments, **named):
        raise ERRORS[kind]

    monkeypatch.setattr(reading.ocp.Checkpointer, "restore", fail)
    wanted = saved_trees(like(states[2], make_mesh()))
    with (
        contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints,
        pytest.raises(UnreadableError, match=r"step 2 .*cannot be read now .*Nothing was touched") as raised,
    ):
        checkpoints.restore_latest(wanted)
    assert raised.value.exit_code == 75
    assert contents(tmp_path / "run") == before


def test_a_file_that_may_not_be_read_now_is_not_damaged(saved, tmp_path, monkeypatch):
    folder, states = saved
    shutil.copytree(folder, tmp_path / "run")
    opened = pathlib.Path.read_text

    def refuse(path, *arguments, **named):
        if path.name == "_CHECKPOINT_METADATA":
            raise OSError(116, "Stale file handle")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    with pytest.raises(UnreadableError, match="Stale file handle"):
        restore(tmp_path / "run", 2, {"params": on_one_device(states[2].params)})


@pytest.mark.parametrize("damage", ["a byte flipped", "cut off", "gone"])
def test_no_damage_to_any_file_goes_unseen(damage, saved, tmp_path):
    folder, states = saved
    wanted = saved_trees(like(states[2], make_mesh(devices=jax.devices()[:1])))
    files = sorted(path.relative_to(folder) for path in (folder / "checkpoints/2").rglob("*") if path.is_file())
    seen = {}
    for file in files:
        run_dir = tmp_path / file.name
        shutil.copytree(folder, run_dir)
        content = bytearray((run_dir / file).read_bytes())
        if damage == "gone":
            (run_dir / file).unlink()
        elif content:
            content[len(content) // 2] ^= 1
            (run_dir / file).write_bytes(content if damage == "a byte flipped" else content[: len(content) // 2])
        messages = []
        with contextlib.closing(Checkpoints(run_dir, warn=messages.append)) as checkpoints:
            step, trees = checkpoints.restore_latest(wanted)
        seen[file] = bool(messages)
        assert step == (1 if messages else 2)
        assert_equal(trees, saved_trees(states[step]))
        assert all("the checkpoint of step 2" in message and "Going back to step 1" in message for message in messages)
        assert (run_dir / "checkpoints/damaged-2").is_dir() == bool(messages)
        shutil.rmtree(run_dir)
    largest = max(files, key=lambda file: (folder / file).stat().st_size)
    assert seen[largest]


@pytest.mark.parametrize("seed", range(2))
def test_random_bytes_flipped_anywhere_are_damage_or_do_not_matter(seed, saved, tmp_path):
    chance, (folder, states) = random.Random(seed), saved
    wanted = {"params": on_one_device(states[2].params), "ema": on_one_device(states[2].ema)}
    files = [path for path in sorted((folder / "checkpoints/2").rglob("*")) if path.is_file() and path.stat().st_size]
    for turn in range(20):
        run_dir = tmp_path / str(turn)
        shutil.copytree(folder, run_dir)
        target = run_dir / chance.choice(files).relative_to(folder)
        content = bytearray(target.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        target.write_bytes(content)
        try:
            trees = restore(run_dir, 2, wanted)
        except DamagedError:
            continue
        assert_equal(trees, {name: getattr(states[2], name) for name in wanted})


def test_damage_is_seen_also_where_the_checksums_of_files_are_missing(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/checkpoints/2.files.json").unlink()
    (tmp_path / "run/checkpoints/2/_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(DamagedError):
        restore(tmp_path / "run", 2, {"params": on_one_device(states[2].params)})


def test_a_run_with_nothing_but_damage_does_not_begin_anew(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path / "run")
    for step in (1, 2):
        (tmp_path / f"run/checkpoints/{step}/_CHECKPOINT_METADATA").write_text("{")
    wanted = saved_trees(like(states[2], make_mesh()))
    for _ in range(2):
        with (
            contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints,
            pytest.raises(InputError, match="has had checkpoints, and none is there"),
        ):
            checkpoints.restore_latest(wanted)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with (
        contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints,
        pytest.raises(InputError, match="A run does not begin anew by itself"),
    ):
        checkpoints.restore_latest(wanted)


def test_numbers_that_are_not_finite_are_neither_saved_nor_restored(tmp_path, monkeypatch):
    state = state_of(0)
    bad = jax.tree.map(lambda leaf: leaf, saved_trees(state))
    bad["opt_state"][1]["head"]["bias"] = bad["opt_state"][1]["head"]["bias"].at[3].set(np.inf)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(NonFiniteError, match="opt_state has numbers that are not finite after step 1"):
            checkpoints.save(1, bad)
        assert steps_of(tmp_path) == []
        # As an earlier version would have saved it.
        sums = packing.checksums
        monkeypatch.setattr("tnt_jax.storage.checkpoint.checksums", lambda arrays: (sums(arrays)[0], True))
        checkpoints.save(1, bad)
        checkpoints.wait()
    with pytest.raises(DamagedError, match="opt_state has numbers that are not finite"):
        restore(tmp_path, 1, {"opt_state": on_one_device(state.opt_state)})


def test_a_step_that_is_saved_again_has_no_scores_until_it_is_evaluated_again(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, saved_trees(state_of(1)))
        checkpoints.set_scores(1, SCORES)
        checkpoints.discard(1, "it is damaged")
        checkpoints.save(1, saved_trees(state_of(1)))
        checkpoints.wait()
    assert (steps_of(tmp_path), reading.scores_of(tmp_path)) == ([1], {})


def test_scores_that_are_damaged_are_as_if_there_were_none(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder, tmp_path / "run")
    for text in ("", "{", "[]", '{"2": 3}', '{"x": {"ema_top1": 1}}', '{"2": {"loss": 1}}'):
        (tmp_path / "run/checkpoints/scores.json").write_text(text)
        assert best_of([2], scores_of(tmp_path / "run"), "top1") is None


# In a process of its own, which has four devices.
ON_OTHER_DEVICES = """
import contextlib, itertools, sys
import jax
from test_checkpoint import assert_equal, like, state_of
from tnt_jax.storage.checkpoint import Checkpoints
from tnt_jax.storage.reading import restore
from tnt_jax.training.run import saved_trees
from tnt_jax.training.mesh import make_mesh

assert jax.device_count() == 4
meshes = [make_mesh(fsdp, jax.devices()[:count]) for count, fsdp in ((1, 1), (4, 1), (4, 2), (4, 4), (2, 2))]
state = state_of(0)
with contextlib.closing(Checkpoints(sys.argv[1], keep=len(meshes))) as checkpoints:
    for step, mesh in enumerate(meshes):
        placed = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), state, like(state, mesh))
        checkpoints.save(step, saved_trees(placed))
    checkpoints.wait()
    for step, mesh in itertools.product(range(len(meshes)), meshes):
        wanted = like(state, mesh)
        restored = restore(sys.argv[1], step, saved_trees(wanted))
        assert_equal(restored, saved_trees(state))
        for found, leaf in zip(jax.tree.leaves(restored), jax.tree.leaves(saved_trees(wanted)), strict=True):
            assert found.sharding == leaf.sharding, (step, found.sharding, leaf.sharding)
"""


@pytest.mark.slow
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


def test_the_best_step_is_that_of_the_lowest_error_and_the_later_one_of_equals():
    scores = {1: {"ema_mae": 3.0}, 2: {"ema_mae": 1.0}, 4: {"ema_mae": 1.0}, 5: {"ema_mae": 2.0}, 6: {"ema_r2": 9.0}}
    assert best_of([1, 2, 4, 5, 6, 7], scores, "mae") == 4
    assert best_of([1, 5], scores, "mae") == 5
    assert best_of([1, 5], scores, "r2") is None
