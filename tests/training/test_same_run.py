"""Before a run starts or goes on: is it the same run, are its data there, and is its folder free?"""

import dataclasses
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from commands import ROOT, run
from PIL import Image
from small_runs import contents, metrics_of, tiny_run

from tnt_jax.config import DataConfig, InputError
from tnt_jax.storage import lock
from tnt_jax.storage.lock import RunLock, RunningError
from tnt_jax.training.loop import train

CHANGES = {
    "execution": {"accumulation_steps": 4, "data": {"num_threads": 1}, "model": {"remat": "all", "inner": "reference"}},
    "observation": {"log_every_steps": 7, "keep_checkpoints": 5, "checkpoint_every_minutes": 3.0, "profile": False},
}


def replaced(config, changes):
    return dataclasses.replace(
        config,
        **{
            name: replaced(getattr(config, name), value) if isinstance(value, dict) else value
            for name, value in changes.items()
        },
    )


@pytest.mark.slow
def test_how_a_run_is_computed_and_watched_may_change_and_is_noted(copy, capsys):
    for changes in CHANGES.values():
        train(replaced(copy, changes))
    out = capsys.readouterr().out
    assert "model.remat was 'none' and is now 'all'" in out
    assert "log_every_steps was 4 and is now 7" in out
    starts = [json.loads(line) for line in (pathlib.Path(copy.run_dir) / "starts.jsonl").read_text().splitlines()]
    execution, observation = (start["changed"] for start in starts[-2:])  # other tests may have started it as well
    assert execution["data.num_threads"] == [2, 1]
    assert observation["keep_checkpoints"] == [2, 5]
    assert json.loads((pathlib.Path(copy.run_dir) / "config.json").read_text())["log_every_steps"] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64}, r"batch_size 128 \(now 64\)"),
        ({"data": {"random_shift": 0.2}}, r"data.random_shift 0.1 \(now 0.2\)"),
        ({"optimizer": {"beta1": 0.8}}, r"optimizer.beta1 0.9 \(now 0.8\)"),
        ({"epochs": 2}, r"epochs 3 \(now 2\)"),
        ({"model": {"depth": 2}}, r"model.depth 1 \(now 2\)"),
    ],
)
def test_what_is_computed_may_not_change(changes, message, copy):
    before = contents(copy.run_dir)
    with pytest.raises(InputError, match=f"another configuration: {message}"):
        train(replaced(copy, changes))
    assert contents(copy.run_dir) == before


@pytest.mark.slow
def test_epochs_may_be_raised_and_the_run_says_what_that_does(finished, tmp_path, capsys):
    shutil.copytree(finished.run_dir, tmp_path / "copy")
    longer = dataclasses.replace(finished, run_dir=str(tmp_path / "copy"), epochs=4)
    train(longer)
    assert "epochs were raised from 3 to 4: the cosine of the learning rate now ends later" in capsys.readouterr().out
    assert metrics_of(tmp_path / "copy")[-1]["step"] == 44


def folder_of(path, classes=("a", "b"), count=8):
    for split in ("train", "test"):
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for index in range(count):
                image = np.random.default_rng(index).integers(0, 256, (16, 16), np.uint8)
                Image.fromarray(image).save(path / split / name / f"{index}.png")
    return f"folder:{path}"


@pytest.mark.slow
def test_data_may_move_and_may_not_change(tmp_path):
    data = DataConfig.plain(folder_of(tmp_path / "here"))
    config = tiny_run(tmp_path / "run", data=data, batch_size=4, epochs=1)
    train(config)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = dataclasses.replace(config, data=dataclasses.replace(data, source=f"folder:{tmp_path}/there"), epochs=2)
    train(moved)
    (tmp_path / "there/train/a/0.png").rename(tmp_path / "there/train/a/9.png")
    with pytest.raises(InputError, match="a run on other data: file names of the training images differ"):
        train(dataclasses.replace(moved, epochs=3))


def idx_of(folder, train_labels, test_labels):
    folder.mkdir(parents=True)
    for split, labels in (("train", train_labels), ("t10k", test_labels)):
        shape = (len(labels), 16, 16)
        images = struct.pack(">HBB3I", 0, 8, 3, *shape) + bytes(len(labels) * 256)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, len(labels)) + bytes(labels))
    return f"idx:{folder}"


def wrong_starts(tmp_path):
    empty = tmp_path / "flat"
    (empty / "test").mkdir(parents=True)
    (empty / "test/labels.txt").write_text("")
    folder_of(empty / "x")
    shutil.move(empty / "x/train", empty / "train")
    bad = folder_of(tmp_path / "bad")
    for path in (tmp_path / "bad/test").rglob("*.png"):
        path.write_bytes(b"no image")
    data = {"batch_size": 4}
    return {
        "init_from nowhere": ({"init_from": str(tmp_path / "nowhere")}, "nowhere"),
        "a negative seed": ({"seed": -1}, "seed is -1"),
        "a negative cooldown": ({"optimizer": {"cooldown_epochs": -1}}, "cooldown_epochs is -1"),
        "a negative rate": ({"optimizer": {"learning_rate": -1.0}}, "learning_rate is -1"),
        "an average of 2": ({"optimizer": {"ema_decay": 2.0}}, "ema_decay is 2"),
        "an empty test split": (data | {"data": {"source": f"folder:{empty}"}}, "flat/test holds no image"),
        "IDX without test images": (
            data | {"data": {"source": idx_of(tmp_path / "idx0", [0, 1] * 4, [])}},
            "has no images",
        ),
        "IDX with more classes to test": (
            data | {"data": {"source": idx_of(tmp_path / "idx1", [0, 1, 2, 0], [0, 4])}},
            "label 4 is out of range",
        ),
        "images that are none": (data | {"data": {"source": bad}}, "cannot be read as an image"),
        "four channels": ({"model": {"in_channels": 4}}, "model.in_channels is 4, and the image has 1 channel"),
    }


@pytest.mark.parametrize("kind", range(10))
def test_what_can_be_known_is_said_before_anything_is_written(kind, tmp_path):
    name, (changes, message) = list(wrong_starts(tmp_path).items())[kind]
    with pytest.raises(InputError, match=message):
        train(replaced(tiny_run(tmp_path / "run"), changes))
    assert not (tmp_path / "run").exists(), name


@pytest.mark.slow
def test_test_images_of_fewer_classes_are_classes_of_the_training_images(tmp_path):
    data = DataConfig.plain(idx_of(tmp_path / "idx", [0, 1, 2, 0] * 2, [0, 1]))
    train(tiny_run(tmp_path / "run", data=data, batch_size=4, epochs=1))
    code, _, err = run("eval.py", tmp_path / "run")
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize(
    "left",
    [
        {},
        {"model.json": "{}"},
        {"model.json": "{}", "config.json": ""},
        {"run.lock": "", ".config.json.unfinished-1": "{"},
    ],
)
def test_an_empty_or_half_made_folder_is_no_dead_end(left, tmp_path):
    (tmp_path / "run").mkdir()
    for name, text in left.items():
        (tmp_path / "run" / name).write_text(text)
    assert train(tiny_run(tmp_path / "run", epochs=1))["count"] == 360


def test_a_full_disk_is_noticed_before_the_run_begins(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(InputError, match=r"has 0.00 GB free, and the checkpoints to come need 0.00 GB: 4 of"):
        train(tiny_run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def hold(folder, seconds=20):
    """A process that holds the folder."""
    code = "import sys, time; from tnt_jax.storage.lock import RunLock\n"
    code += f"with RunLock({str(folder)!r}, print, print): print('held', flush=True); time.sleep({seconds})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(copy, capsys):
    holder = hold(copy.run_dir)
    try:
        before = contents(copy.run_dir)
        with pytest.raises(RunningError, match=f"is being trained by process {holder.pid} on") as raised:
            train(copy)
        assert raised.value.exit_code == 75
        assert contents(copy.run_dir) == before
    finally:
        holder.kill()
        holder.wait()
    train(copy)
    assert "was here last" not in capsys.readouterr().out
    assert not (pathlib.Path(copy.run_dir) / "run.lock.json").exists()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that a process of another machine has held; what it writes next."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    path = tmp_path / "run.lock.json"

    def beat(number):
        path.write_text(json.dumps({"host": "other", "process": 7, "place": "b", "token": "t", "beat": number}))

    beat(0)
    return tmp_path, beat


def test_a_holder_on_another_machine_that_lives_keeps_the_folder(elsewhere):
    folder, beat = elsewhere
    told = []
    monkey = iter(range(1, 1000))

    def tell(text):
        told.append(text)
        beat(next(monkey))

    with pytest.raises(RunningError, match="is being trained by process 7 on other"), RunLock(folder, tell, print):
        pass
    assert "process 7 on other was here last; watching for" in told[0]


def test_a_holder_on_another_machine_that_died_loses_the_folder(elsewhere):
    folder, _ = elsewhere
    with RunLock(folder, print, print):
        assert json.loads((folder / "run.lock.json").read_text())["process"] != 7
    assert not (folder / "run.lock.json").exists()


def test_who_was_stopped_while_another_took_the_folder_is_told(elsewhere):
    folder, beat = elsewhere
    lost = []
    with RunLock(folder, print, lost.append):
        beat(1)
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "process 7 on other has taken" in lost[0]


def test_a_beat_on_its_way_does_not_come_back_after_the_run(tmp_path, monkeypatch):
    begun, write = threading.Event(), lock.write_text

    def slowly(path, text):
        if '"beat": 1' in text:
            begun.set()
            time.sleep(0.3)
        write(path, text)

    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(lock, "write_text", slowly)
    with RunLock(tmp_path, print, print):
        assert begun.wait(30)
    time.sleep(0.6)
    assert not (tmp_path / lock.HOLDER_FILE).exists()
