"""What must never happen to a run: it begins anew by itself, it saves what is worth nothing, or it is stuck."""

import dataclasses
import json
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, run
from PIL import Image
from small_runs import config_file, metrics_of, parameters, tiny_run

import tnt_jax
from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.sources import ArraySource
from tnt_jax.storage import lock, reading
from tnt_jax.storage.checkpoint import NonFiniteError
from tnt_jax.storage.lock import RunLock, RunningError
from tnt_jax.storage.reading import UnreadableError, steps_of
from tnt_jax.training import run as run_module
from tnt_jax.training.loop import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = tiny_run(tmp_path_factory.mktemp("runs") / "finished")
    train(config)
    return config


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run without its last checkpoint, which an earlier kill has left unwritten."""
    shutil.copytree(finished.run_dir, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/33")
    return dataclasses.replace(finished, run_dir=str(tmp_path / "copy"))


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


def test_what_cannot_be_read_now_ends_the_run_and_harms_nothing(finished, copy, monkeypatch):
    before = contents(copy.run_dir, "starts.jsonl")

    def stale(*arguments, **named):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(reading.ocp.Checkpointer, "restore", stale)
        with pytest.raises(UnreadableError, match=r"step 22 .*Stale file handle.*Nothing was touched"):
            train(copy)
    assert contents(copy.run_dir, "starts.jsonl") == before
    train(copy)
    assert_ended_as(copy, finished)


@pytest.mark.slow
def test_lines_that_a_restart_drops_from_the_metrics_are_kept_beside_them(finished, copy):
    train(copy)
    dropped = (pathlib.Path(copy.run_dir) / "metrics_dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped] == [24, 28, 32, 33, 33]
    assert_ended_as(copy, finished)


@pytest.mark.slow
def test_parameters_in_bfloat16_train_go_on_and_load(finished, tmp_path, monkeypatch):
    def config(name):
        model = dataclasses.replace(finished.model, param_dtype="bfloat16")
        return dataclasses.replace(finished, model=model, run_dir=str(tmp_path / name))

    whole = train(config("whole"))

    class Killed(Exception):
        pass

    take_step = run_module.Run.train_step

    def die(self, state, batch):
        if int(state.step) == 15:
            raise Killed
        return take_step(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "train_step", die)
        with pytest.raises(Killed):
            train(config("killed"))
    assert train(config("killed")) == whole
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    for weights in ("ema", "raw"):
        loaded = tnt_jax.load_model(tmp_path / "killed", weights=weights)
        assert {leaf.dtype for leaf in jax.tree.leaves(tnt_jax.storage.folder.model_parameters(loaded))} == {
            jnp.dtype("bfloat16")
        }
    assert train(config("killed")) == whole


def test_what_is_useless_after_an_update_is_not_saved(tmp_path):
    optimizer = dataclasses.replace(tiny_run("x").optimizer, learning_rate=1e38, warmup_epochs=0)
    config = tiny_run(tmp_path / "run", optimizer=optimizer, batch_size=1437, log_every_steps=1)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"the param norm of step 1 is inf; there is no checkpoint yet"):
            train(config)
        assert steps_of(config.run_dir) == []
        assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_step_whose_scores_are_not_finite_is_no_checkpoint(finished, copy, monkeypatch):
    evaluate = run_module.Run.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "evaluate", lambda *of: evaluate(*of) | {"ema_loss": float("nan")})
        with pytest.raises(
            NonFiniteError, match=r"ema loss of an evaluation after step 33 is nan; the last good .* 22"
        ):
            train(copy)
    assert max(steps_of(copy.run_dir)) == 22
    train(copy)
    assert_ended_as(copy, finished)


class Counted(ArraySource):
    """Counts how often an image is read."""

    reads = 0

    def __getitem__(self, index):
        Counted.reads += 1
        return super().__getitem__(index)


@pytest.mark.slow
def test_an_evaluation_reads_every_image_once_for_both_weights(finished, copy, monkeypatch):
    opened = run_module.open_source

    def counted(source, split):
        found = opened(source, split)
        return Counted(found.images, found.labels, found.class_names) if split == "test" else found

    monkeypatch.setattr(run_module, "open_source", counted)
    train(copy)
    assert Counted.reads == 360 + 1  # one is looked at before the run begins


# train.py, to which something happens when it calls something.
DISTURBED = """
import os, runpy, signal, sys, time
from tnt_jax.training import loop, run, step
{code}
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def start(code, *arguments, **options):
    command = [sys.executable, "-u", "-c", DISTURBED.format(code=code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_stop_in_an_evaluation_is_noticed_and_what_was_trained_is_saved_before_it(finished, tmp_path):
    code = """
feed = step.to_devices
def slowly(batch, mesh):
    if "mask" in batch:
        if os.environ.get("SENT") is None:
            os.environ["SENT"] = "yes"
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return feed(batch, mesh)
step.to_devices = slowly
"""
    flags = ["--run-dir", tmp_path / "run", "--config", config_file(tmp_path)]
    process = start(code, *flags)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped after step 11 of 33, which is saved" in err
    assert steps_of(tmp_path / "run") == [11]
    # The evaluation that was not finished comes first.
    config = dataclasses.replace(finished, run_dir=str(tmp_path / "run"))
    train(config)
    assert_ended_as(config, finished)


@pytest.mark.slow
def test_a_run_that_is_killed_in_an_epoch_without_end_goes_on_from_minutes_ago(tmp_path):
    flags = ["--run-dir", tmp_path / "run", "--config", config_file(tmp_path), "--data.source", "synthetic:200000"]
    flags += ["--batch-size", "8", "--checkpoint-every-minutes", "0.02", "--log-every-steps", "1"]
    process = start("", *flags)
    deadline = time.monotonic() + 90
    while len(steps_of(tmp_path / "run")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    saved = steps_of(tmp_path / "run")
    assert saved, out + err
    assert max(saved) < 25_000
    process = start("", *flags)
    for line in process.stdout:
        if ", from step " in line:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert "Going on with tnt_custom_patch8_16: 1 blocks" in line
    assert int(line.split(", from step ")[1].split()[0]) >= max(saved)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("moment", ["import jax", "compiling"])
def test_a_signal_while_the_run_starts_ends_it_at_once(number, code, moment, tmp_path):
    sleeping = {
        "import jax": "import tnt_jax.commands.train as command\n"
        "command.parse_with_config = lambda *_: time.sleep(60)\n"
        "print('here', flush=True)",
        "compiling": "def init(self, config):\n print('here', flush=True)\n time.sleep(60)\nrun.Run.__init__ = init",
    }[moment]
    process = start(sleeping, "--run-dir", tmp_path / "run", "--config", config_file(tmp_path))
    assert "here" in process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "nothing was begun" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_says_what_is_kept(tmp_path):
    code = """
take = run.Run.train_step
def slowly(self, state, batch):
    if int(state.step) == 13:
        print("slow", flush=True)
        time.sleep(60)
    return take(self, state, batch)
run.Run.train_step = slowly
"""
    process = start(code, "--run-dir", tmp_path / "run", "--config", config_file(tmp_path))
    for line in process.stdout:
        if line.startswith("slow"):
            break
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends at once" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "stopped by Ctrl-C; the checkpoint of step 11 is kept, and the same command goes on from there" in err


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
    assert starts[1]["changed"]["data.num_threads"] == [2, 1]
    assert starts[2]["changed"]["keep_checkpoints"] == [2, 5]
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
        "an empty test split": (data | {"data": {"source": f"folder:{empty}"}}, "split 'test' .* has no images"),
        "IDX without test images": (
            data | {"data": {"source": idx_of(tmp_path / "idx0", [0, 1] * 4, [])}},
            "has no images",
        ),
        "IDX with more classes to test": (
            data | {"data": {"source": idx_of(tmp_path / "idx1", [0, 1, 2, 0], [0, 4])}},
            "label 4 is out of range",
        ),
        "images that are none": (data | {"data": {"source": bad}}, "cannot be read as an image"),
        "four channels": ({"model": {"in_channels": 4}}, "model.in_channels is 4, and the images have 1"),
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


def test_damage_to_one_step_keeps_no_other_from_being_loaded(finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    (tmp_path / "run/checkpoints/22/_CHECKPOINT_METADATA").write_text("{")
    before = contents(tmp_path / "run")
    assert parameters(tmp_path / "run", step=33)
    with pytest.raises(InputError, match=r"step 22 .* is damaged .*of the run, it has [0-9, ]*22, 33"):
        tnt_jax.load_model(tmp_path / "run", step=22)
    assert contents(tmp_path / "run") == before


def test_a_run_is_loaded_while_its_old_steps_go(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/33")
    restore = reading.restore

    def as_it_goes(run_dir, step, like):
        if step == 22:
            shutil.copytree(f"{finished.run_dir}/checkpoints/33", tmp_path / "run/checkpoints/33")
            shutil.rmtree(tmp_path / "run/checkpoints/22")
        return restore(run_dir, step, like)

    monkeypatch.setattr("tnt_jax.storage.trained.restore", as_it_goes)
    assert tnt_jax.load_model(tmp_path / "run")


# Ten lines of stock Orbax: docs/training.md shows them.
STOCK_ORBAX = (ROOT / "docs/training.md").read_text()


def test_stock_orbax_reads_the_parameters_of_a_run(finished):
    text = STOCK_ORBAX.partition("<!-- stock Orbax -->\n```python\n")[2].partition("```")[0]
    assert 0 < len(text.strip().splitlines()) <= 12
    names = {}
    exec(text.replace("runs/digits/checkpoints/2200", f"{finished.run_dir}/checkpoints/33"), names)
    model = tnt_jax.load_model(finished.run_dir, weights="raw", step=33)
    ours = tnt_jax.storage.folder.model_parameters(model)
    assert names["parameters"].keys() == ours.keys()
    assert all((np.asarray(ours[name]) == value).all() for name, value in names["parameters"].items())


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


@pytest.mark.slow
def test_a_run_that_was_killed_between_a_line_and_its_scores_has_the_line_once(finished, copy):
    (pathlib.Path(copy.run_dir) / "checkpoints/scores.json").unlink()
    train(copy)
    assert_ended_as(copy, finished)
