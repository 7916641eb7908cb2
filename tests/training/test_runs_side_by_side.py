"""The list of runs, and their curves in one picture."""

import csv
import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, run
from small_runs import tiny_run

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.storage.lock import HOLDER_FILE, RunLock, is_held
from tnt_jax.training.report import duration
from tnt_jax.visualize.runs import compare_curves


@pytest.fixture
def runs(finished, tmp_path):
    """A finished run, and one that was stopped and has another learning rate."""
    for name in ("finished", "deep/stopped"):
        shutil.copytree(finished.run_dir, tmp_path / "runs" / name)
    (tmp_path / "runs/no_run").mkdir()
    path = tmp_path / "runs/deep/stopped"
    shutil.rmtree(path / "checkpoints/33")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:-3]))
    config = (path / "config.json").read_text()
    assert '"learning_rate": 0.005' in config
    (path / "config.json").write_text(config.replace('"learning_rate": 0.005', '"learning_rate": 0.01'))
    return tmp_path / "runs"


@pytest.mark.slow
def test_each_run_has_its_line_with_what_differs(runs, tmp_path):
    code, out, err = run("tnt_jax/commands/runs.py", runs, "--table", tmp_path / "table.csv")
    assert code == 0, err
    stopped, whole = csv.DictReader((tmp_path / "table.csv").open())
    assert (whole["run"], whole["state"], whole["epoch"]) == ("finished", "finished", "3/3")
    assert (stopped["run"], stopped["state"]) == ("deep/stopped", "stopped")
    assert (stopped["optimizer.learning_rate"], whole["optimizer.learning_rate"]) == ("0.01", "0.005")
    assert whole["best top-1"].endswith("%")
    assert "batch_size" not in whole
    assert "deep/stopped" in out
    with RunLock(runs / "finished", print, print):
        code, out, _ = run("tnt_jax/commands/runs.py", runs)
    assert "running" in out


def test_a_run_whose_process_died_a_moment_ago_is_not_running(tmp_path):
    dies = "import os, sys; from tnt_jax.storage.lock import RunLock; RunLock(sys.argv[1], print, print).__enter__(); "
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", dies + "os._exit(0)", tmp_path], env=environment, check=True)
    assert (tmp_path / HOLDER_FILE).exists()
    assert not is_held(tmp_path)
    with RunLock(tmp_path, print, print):
        assert is_held(tmp_path)


def test_a_folder_without_runs_is_refused(tmp_path):
    code, _, err = run("tnt_jax/commands/runs.py", tmp_path)
    assert (code, err) == (2, f"error: {tmp_path} holds no run\n")


def test_curves_of_several_runs_are_in_one_picture(runs, tmp_path):
    both = [runs / "finished", runs / "deep/stopped"]
    loss, measure, _ = compare_curves(both).axes
    assert [line.get_label() for line in loss.lines] == list(map(os.fspath, both))
    assert [len(line.get_xdata()) for line in measure.lines] == [3, 2]
    code, _, err = run("visualize.py", "curves", *both, "--out", tmp_path / "a.png")
    assert code == 0, err
    with pytest.raises(InputError, match="is not the folder of a run"):
        compare_curves([runs / "finished", runs])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.4, "12 s"), (99.6, "2 min"), (19_200, "5 h 20 min"), (84_960, "23 h 36 min"), (3 * 86_400, "3 d 0 h")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_long_epoch_says_how_it_goes_every_now_and_then(tmp_path, capsys):
    config = tiny_run(tmp_path / "run", epochs=1)
    tnt_jax.train(dataclasses.replace(config, log_every_seconds=1e-6))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1, step ")]
    assert len(lines) == 10
    assert lines[3].startswith("epoch 1/1, step 4 of 11  loss 2.")
