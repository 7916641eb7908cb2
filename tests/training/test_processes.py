"""Several processes on this machine: they train as one would, and none outlives the others."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from commands import ROOT, run
from generated import write_table
from PIL import Image
from small_runs import config_file, metrics_of, parameters, tiny_run

from tnt_jax.config import DistributedConfig, InputError
from tnt_jax.training.loop import train
from tnt_jax.training.meeting import PeersError
from tnt_jax.training.processes import process_group
from tnt_jax.training.stopping import Signals

# train.py, in which something happens after step 5.
RUN = """
import os, runpy, signal, sys, time
from tnt_jax.training import run
take_step = run.Run.train_step
taken = 0
def train_step(self, state, batch):
    global taken
    taken += 1
    result = take_step(self, state, batch)
    if taken == 5:
        {happens}
    return result
run.Run.train_step = train_step
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


# Adam divides by squares near 0, and so makes the order of additions grow in 33 steps: with its own epsilon to 2e-5 of
# the loss, with 1e-3 to 1.03e-5 of a gradient norm.
EPSILON = 1e-2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = tiny_run(tmp_path_factory.mktemp("runs") / "finished")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, epsilon=EPSILON))
    train(config)
    return config


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(folder, *arguments, count=2, devices=2, happens=()) -> list[subprocess.Popen]:
    """The processes of a run, in which each does what `happens` says by its index, after its step 5."""
    port, config = free_port(), config_file(folder)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    processes = []
    for index in range(count):
        code = RUN.format(happens=dict(happens).get(index, "pass"))
        told = ["coordinator", f"127.0.0.1:{port}", "num-processes", str(count), "process-id", str(index)]
        flags_of_one = [f"--distributed.{name}={value}" for name, value in zip(told[::2], told[1::2], strict=True)]
        command = [sys.executable, "-c", code, "--config", config, "--run-dir", str(folder / "run"), *arguments]
        command += ["--optimizer.epsilon", str(EPSILON)]
        processes.append(
            subprocess.Popen(
                [*command, *(flags_of_one if count > 1 else [])],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def end(processes) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    try:
        texts = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def assert_ended_alike(run_dir, other_dir):
    """The same history and parameters, to what the order of additions changes."""
    ours, others = metrics_of(run_dir), metrics_of(other_dir)
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in others]
    for name in ("loss", "grad_norm", "ema_loss"):
        pairs = [(mine[name], theirs[name]) for mine, theirs in zip(ours, others, strict=True) if name in mine]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5, err_msg=name)
    for weights in ("ema", "raw"):
        pairs = zip(
            parameters(run_dir, weights=weights, step=33), parameters(other_dir, weights=weights, step=33), strict=True
        )
        for mine, theirs in pairs:
            np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max() + 1e-7)


# JAX's service looks for a signal once a second.
SIGTERM = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(3)"
SIGINT = "os.kill(os.getpid(), signal.SIGINT); time.sleep(3)"


def test_two_processes_stop_together_at_sigterm_to_one_and_one_process_ends_their_run_as_its_own(finished, tmp_path):
    (code0, out0, err0), (code1, out1, err1) = end(start(tmp_path, happens={1: SIGTERM}))
    assert (code0, code1) == (75, 75), err0 + err1
    stopped = [line for line in (err0 + err1).splitlines() if line.startswith("error: stopped after step")]
    assert len(stopped) == 2
    assert stopped[0] == stopped[1]
    for index, out in enumerate((out0, out1)):
        assert f"process {index} of 2 on {socket.gethostname()}: 2 of 4 devices (cpu)" in out
    assert "Training tnt_custom_patch8_16" in out0
    assert "Training tnt_custom_patch8_16" not in out1
    assert parameters(tmp_path / "run", weights="raw")  # as of a run on any devices
    train(dataclasses.replace(finished, run_dir=str(tmp_path / "run")))
    assert_ended_alike(tmp_path / "run", finished.run_dir)


@pytest.mark.slow
def test_two_processes_with_two_devices_train_as_one_with_four(tmp_path):
    for name, processes in (("one", {"count": 1, "devices": 4}), ("two", {"count": 2, "devices": 2})):
        (tmp_path / name).mkdir()
        for code, _, err in end(start(tmp_path / name, **processes)):
            assert code == 0, err
    assert_ended_alike(tmp_path / "two/run", tmp_path / "one/run")


@pytest.mark.slow
def test_run_goes_from_one_process_to_two_and_back(finished, tmp_path):
    stops = {0: SIGTERM}
    turns = ({"count": 1, "devices": 1}, {"count": 2, "devices": 2}, {"count": 1, "devices": 4})
    for turn, processes in enumerate(turns):
        results = end(start(tmp_path, happens=stops if turn < 2 else {}, **processes))
        assert {code for code, _, _ in results} == ({75} if turn < 2 else {0}), results
    assert_ended_alike(tmp_path / "run", finished.run_dir)


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_all_as_ctrl_c_does(tmp_path):
    results = end(start(tmp_path, happens={1: SIGINT}))
    assert [code for code, _, _ in results] == [130, 130], results
    assert all("stopped after step" in err for _, _, err in results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "happens", "code", "message"),
    [
        (1, "os.kill(os.getpid(), signal.SIGKILL)", 75, "process 1 on"),
        (0, "os.kill(os.getpid(), signal.SIGKILL)", 75, "process 0 on"),
        (1, "raise ValueError('a bug')", 1, "a bug"),
        (0, "raise ValueError('a bug')", 1, "a bug"),
    ],
)
def test_no_process_outlives_another(who, happens, code, message, tmp_path):
    processes = start(tmp_path, happens={who: happens})
    processes[who].wait(timeout=600)
    died = time.monotonic()
    processes[1 - who].wait(timeout=60)
    assert time.monotonic() - died < 60
    _, _, err = end(processes)[1 - who]
    assert processes[1 - who].returncode == code, err
    assert message in err
    assert "Traceback" not in err


def test_process_zero_says_who_did_not_come():
    with (
        pytest.raises(PeersError, match=r"waited 1 s for 3 processes at 127.0.0.1:\d+; 1, 2 did not come"),
        process_group(DistributedConfig(f"127.0.0.1:{free_port()}", 3, 0, timeout=1), {}, Signals(False)),
    ):
        pass


def test_other_processes_say_that_the_coordinator_cannot_be_reached():
    with (
        pytest.raises(PeersError, match=r"waited 1 s: process 1 cannot reach the coordinator at 127.0.0.1:\d+ \("),
        process_group(DistributedConfig(f"127.0.0.1:{free_port()}", 2, 1, timeout=1), {}, Signals(False)),
    ):
        pass


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([(3, 1)], "process 1 on .* is one of 3, and process 0 one of 2"),
        ([(3, 1), (3, 1)], "there are two processes 1"),
    ],
)
def test_processes_that_contradict_each_other_are_all_told_so(others, message):
    coordinator, told = f"127.0.0.1:{free_port()}", []

    def other(count, index):
        try:
            with process_group(DistributedConfig(coordinator, count, index, timeout=20), {}, Signals(False)):
                pass
        except InputError as error:
            told.append(str(error))

    threads = [threading.Thread(target=other, args=arguments) for arguments in others]
    for thread in threads:
        thread.start()
    with (
        pytest.raises(InputError, match=message),
        process_group(DistributedConfig(coordinator, 1 + len(others), 0, timeout=20), {}, Signals(False)),
    ):
        pass
    for thread in threads:
        thread.join(timeout=20)
    assert len(told) == len(others)
    assert all(re.search(message, each) for each in told)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["coordinator=here:1"], "--distributed.num-processes, --distributed.process-id is missing"),
        (
            ["coordinator=here", "num-processes=2", "process-id=0"],
            "distributed.coordinator is 'here', and must be HOST",
        ),
        (["coordinator=here:1", "num-processes=2", "process-id=2"], "process-id is 2, and must lie between 0 and 1"),
    ],
)
def test_incomplete_flags(flags, message, tmp_path):
    code, _, err = run("train.py", "--run-dir", tmp_path / "run", *(f"--distributed.{flag}" for flag in flags))
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def start_two(folder, *flags):
    """Two processes, each with flags of its own."""
    port, processes = free_port(), []
    for index, own in enumerate(flags):
        told = {"coordinator": f"127.0.0.1:{port}", "num-processes": 2, "process-id": index}
        command = [sys.executable, "train.py", "--config", config_file(folder), "--run-dir", str(folder / "run"), *own]
        command += [f"--distributed.{name}={value}" for name, value in told.items()]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    return end(processes)


@pytest.mark.slow
def test_processes_of_two_configurations_do_not_train_together(tmp_path):
    results = start_two(tmp_path, ["--seed", "0"], ["--seed", "5", "--optimizer.learning-rate", "0.05"])
    assert [code for code, _, _ in results] == [2, 2], results
    for _, _, err in results:
        assert "config.optimizer.learning_rate is 0.05 there and 0.005 on process 0; config.seed is 5 there" in err
        assert f"process 1 on {socket.gethostname()}" in err
        assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_read_other_data_do_not_train_together(tmp_path):
    for index in range(2):
        for split in ("train", "test"):
            for name in ("a", "b"):
                folder = tmp_path / f"data{index}" / split / name
                folder.mkdir(parents=True)
                for number in range(8):
                    Image.new("L", (16, 16), 9).save(folder / f"{number + index * (split == 'train')}.png")
    flags = ["--batch-size", "4", "--model.in-channels", "3"]
    results = start_two(tmp_path, *([*flags, f"--data.source=folder:{tmp_path}/data{index}"] for index in range(2)))
    assert [code for code, _, _ in results] == [2, 2], results
    for _, _, err in results:
        assert f"process 1 on {socket.gethostname()} reads other data than process 0: file names of the training" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_that_compiles_ends_all_at_once(number, tmp_path):
    code = """
import runpy, sys, time
from tnt_jax.training import run
def init(self, config):
    print("here", flush=True)
    time.sleep(300)
run.Run.__init__ = init
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
    port, processes = free_port(), []
    for index in range(2):
        told = {"coordinator": f"127.0.0.1:{port}", "num-processes": 2, "process-id": index}
        command = [sys.executable, "-c", code, "--run-dir", str(tmp_path / "run")]
        command += [f"--distributed.{name}={value}" for name, value in told.items()]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    for process in processes:
        assert any("here" in line for line in iter(process.stdout.readline, ""))
    time.sleep(0.5)
    processes[1].send_signal(number)
    began = time.monotonic()
    results = end(processes)
    assert time.monotonic() - began < 30
    assert {code for code, _, _ in results} == {75 if number == signal.SIGTERM else 130}, results
    assert "process 1 on" in results[0][2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [("shapes", "multi_label"), ("position", "regression")])
def test_every_row_of_all_processes_is_scored(name, task, tmp_path):
    """What has no sums that could be added: average precision, R2."""
    source = write_table(tmp_path / "data", name)
    flags = ["--data.source", source, "--data.task", task, "--batch-size", "32", "--epochs", "1"]
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        for code, _, err in end(start(tmp_path / str(count), *flags, count=count)):
            assert code == 0, err
    one, two = (
        next(line for line in metrics_of(tmp_path / str(count) / "run") if line.pop("kind") == "test")
        for count in (1, 2)
    )
    assert one["count"] == two["count"] == 60
    assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
