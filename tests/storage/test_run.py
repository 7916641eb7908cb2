"""The folder of a run: who may have it, and that reading one leaves the process as it was."""

import contextlib
import dataclasses
import json
import logging
import os
import sys

import jax
import jax.numpy as jnp
import pytest

from tnt_jax.config import InputError, TrainConfig
from tnt_jax.models.variants import complete
from tnt_jax.storage.checkpoint import Checkpoints
from tnt_jax.storage.lock import RunningError
from tnt_jax.storage.reading import UnreadableError, restore
from tnt_jax.storage.run import claim, compare, is_run
from tnt_jax.tasks.task import Outputs

NAMES = [str(number) for number in range(10)]


def config(folder, **changes):
    return dataclasses.replace(complete(TrainConfig(run_dir=str(folder)), num_classes=10), **changes)


def test_a_folder_that_another_start_claimed_after_it_was_looked_at_is_not_taken(tmp_path):
    one, other = config(tmp_path), config(tmp_path, seed=2)
    seen = compare(one, {"labels": "a"})
    assert seen is None
    claim(one, NAMES, Outputs(), {"labels": "a"}, seen, {})
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(RunningError, match="was claimed by another start") as raised:
        claim(one, NAMES, Outputs(), {"labels": "a"}, seen, {})
    assert raised.value.exit_code == 75
    with pytest.raises(InputError, match="a run of another configuration: seed 0"):
        claim(other, NAMES, Outputs(), {"labels": "a"}, seen, {})
    assert (tmp_path / "config.json").read_text() == before
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 1
    claim(one, NAMES, Outputs(), {"labels": "a"}, compare(one, {"labels": "a"}), {})


@pytest.mark.parametrize("file", ["config.json", "data.json"])
def test_a_stutter_of_the_disk_while_a_run_is_compared_is_another_try(file, tmp_path, monkeypatch):
    claim(config(tmp_path), NAMES, Outputs(), {"labels": "a"}, None, {})
    read = type(tmp_path).read_text

    def stale(path, *arguments, **named):
        if path.name == file:
            raise OSError(116, "Stale file handle")
        return read(path, *arguments, **named)

    monkeypatch.setattr(type(tmp_path), "read_text", stale)
    with pytest.raises(UnreadableError, match="Stale file handle"):
        compare(config(tmp_path), {"labels": "a"})


@pytest.mark.parametrize("look", ["exists", "iterdir", "open"])
@pytest.mark.parametrize(("code", "error"), [(116, UnreadableError), (5, UnreadableError), (13, InputError)])
def test_a_folder_that_cannot_be_looked_at_now_is_another_try_and_one_that_may_not_is_a_message(
    look, code, error, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(type(tmp_path), look, fail)
    with pytest.raises(error, match=os.strerror(code)) as raised:
        claim(config(tmp_path), NAMES, Outputs(), {"labels": "a"}, None, {})
    assert getattr(raised.value, "exit_code", 2) == (75 if error is UnreadableError else 2)
    monkeypatch.undo()
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("config.json", json.dumps({"architecture": "tnt_s_patch16_224"}), False),  # a repository of the hub
        ("config.json", "{}", True),
        ("starts.jsonl", "", True),
        ("model.json", "{}", False),
    ],
)
def test_what_is_a_run(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    assert is_run(tmp_path) == expected


def test_writing_and_reading_a_run_leaves_the_process_as_it_was(tmp_path):
    before = sys.unraisablehook, logging.getLogger("absl").level
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = {"a": jnp.ones(3)}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"params": tree})
    restore(tmp_path, 1, {"params": {"a": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=here)}})
    assert (sys.unraisablehook, logging.getLogger("absl").level) == before
