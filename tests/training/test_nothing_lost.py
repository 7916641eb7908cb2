"""What must never happen to a run: it begins anew by itself, it saves what is worth nothing, it loses a stop."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from small_runs import assert_ended_as, config_file, contents, history, parameters, tiny_run

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.data.sources import Split
from tnt_jax.storage import reading
from tnt_jax.storage.checkpoint import NonFiniteError
from tnt_jax.storage.reading import UnreadableError, steps_of
from tnt_jax.training import run as run_module
from tnt_jax.training.loop import train


@pytest.mark.slow
def test_what_cannot_be_read_now_ends_the_run_and_harms_nothing(finished, copy, monkeypatch):
    before = contents(copy.run_dir, "starts.jsonl")

    def stale(*arguments, **named):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(reading.ocp.Checkpointer, "restore", stale)
        with pytest.raises(UnreadableError, match=r"step 22 .*Stale file handle.*Nothing was touched"):
            train(copy)
    with monkeypatch.context() as patch:
        patch.setattr(reading.ocp.CheckpointManager, "__init__", stale)  # it lists the folder, too
        with pytest.raises(UnreadableError, match=r"checkpoints .*Stale file handle.*Nothing was touched"):
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


@pytest.mark.slow
def test_what_is_useless_after_an_update_is_not_saved(tmp_path):
    optimizer = dataclasses.replace(tiny_run("x").optimizer, learning_rate=1e38, warmup_epochs=0)
    config = tiny_run(tmp_path / "run", optimizer=optimizer, batch_size=1436, log_every_steps=1)
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


class Counted(Split):
    """Counts how often an image is read."""

    reads = 0

    def read(self, *where):
        Counted.reads += 1
        return super().read(*where)


@pytest.mark.slow
def test_an_evaluation_reads_every_image_once_for_both_weights(finished, copy, monkeypatch):
    opened = run_module.open_split

    def counted(source, split):
        found = opened(source, split)
        return found if split == "train" else Counted(found.images, found.targets, found.class_names, found.name)

    monkeypatch.setattr(run_module, "open_split", counted)
    train(copy)
    assert Counted.reads == 360 + 1  # one is looked at before the run begins


# train.py, to which something happens when it calls something.
DISTURBED = """
import os, runpy, signal, sys, time
from tnt_jax.training import loop, run
{code}
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def start(code, *arguments, **options):
    command = [sys.executable, "-u", "-c", DISTURBED.format(code=code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_a_stop_in_an_evaluation_is_noticed_and_what_was_trained_is_saved_before_it(finished, tmp_path):
    code = """
feed = run.to_devices
def slowly(batch, mesh):
    if "mask" in batch:
        if os.environ.get("SENT") is None:
            os.environ["SENT"] = "yes"
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return feed(batch, mesh)
run.to_devices = slowly
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


@pytest.mark.nightly
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
@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("import jax", signal.SIGTERM, 75),
        ("compiling", signal.SIGINT, 130),
        pytest.param("import jax", signal.SIGINT, 130, marks=pytest.mark.nightly),
        pytest.param("compiling", signal.SIGTERM, 75, marks=pytest.mark.nightly),
    ],
)
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

    monkeypatch.setattr("tnt_jax.storage.run.restore", as_it_goes)
    assert tnt_jax.load_model(tmp_path / "run")


# Ten lines of stock Orbax: docs/training.md shows them.
STOCK_ORBAX = (ROOT / "docs/training.md").read_text()


def test_stock_orbax_reads_the_parameters_of_a_run(finished):
    text = STOCK_ORBAX.partition("<!-- stock Orbax -->\n```python\n")[2].partition("```")[0]
    assert 0 < len(text.strip().splitlines()) <= 12
    names = {}
    exec(text.replace("runs/digits/checkpoints/1760", f"{finished.run_dir}/checkpoints/33"), names)
    model = tnt_jax.load_model(finished.run_dir, weights="raw", step=33)
    ours = tnt_jax.storage.folder.model_parameters(model)
    assert names["parameters"].keys() == ours.keys()
    assert all((np.asarray(ours[name]) == value).all() for name, value in names["parameters"].items())


@pytest.mark.slow
def test_a_run_that_was_killed_between_a_line_and_its_scores_has_the_line_once(finished, copy):
    (pathlib.Path(copy.run_dir) / "checkpoints/scores.json").unlink()
    train(copy)
    assert_ended_as(copy, finished)
