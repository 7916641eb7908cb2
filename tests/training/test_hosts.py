"""Several processes on this machine: they train as one would, and none outlives the others."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import ROOT, run
from generated import write_table
from PIL import Image
from small_runs import config_file, free_port, metrics_of, parameters, tiny_run

from tnt_jax.config import DistributedConfig, InputError
from tnt_jax.data.workers import WorkerError
from tnt_jax.training.hosts import Hosts, LostError, _detected, joined
from tnt_jax.training.loop import train
from tnt_jax.training.signals import Signals

# train.py, in which something happens before it, and after step 5.
RUN = """
import os, runpy, signal, sys, time
import jax
from tnt_jax.training import run
{before}
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


def devices_of_each(count) -> str:
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"


def start(folder, *arguments, count=2, devices=2, happens=(), before=()) -> list[subprocess.Popen]:
    """The processes of a run, in which each does what `happens` says by its index, after its step 5, or `before`."""
    port, config = free_port(), config_file(folder)
    processes = []
    for index in range(count):
        code = RUN.format(happens=dict(happens).get(index, "pass"), before=dict(before).get(index, ""))
        told = ["coordinator", f"127.0.0.1:{port}", "num-processes", str(count), "process-id", str(index)]
        flags_of_one = [f"--distributed.{name}={value}" for name, value in zip(told[::2], told[1::2], strict=True)]
        command = [sys.executable, "-c", code, "--config", config, "--run-dir", str(folder / "run"), *arguments]
        command += ["--optimizer.epsilon", str(EPSILON)]
        processes.append(
            subprocess.Popen(
                [*command, *(flags_of_one if count > 1 else [])],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": devices_of_each(devices), "PYTHONPATH": str(ROOT)},
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


# It is noticed within a few seconds.
SIGTERM = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)"
SIGINT = "os.kill(os.getpid(), signal.SIGINT); time.sleep(1)"


@pytest.mark.nightly
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


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HERE = socket.gethostname()
LOST = "raise jax.errors.JaxRuntimeError('UNAVAILABLE: the TPU worker is not reachable')"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "happens", "codes", "message"),
    [
        # JAX aborts where no collective fails first.
        (1, KILLED, (75, -signal.SIGABRT), "another process is lost|another task died|gloo"),
        pytest.param(0, KILLED, (75, -signal.SIGABRT), "another process is lost|gloo", marks=pytest.mark.nightly),
        pytest.param(1, LOST, (75,), "UNAVAILABLE: the TPU worker is not", marks=pytest.mark.nightly),
        pytest.param(0, LOST, (75,), "UNAVAILABLE: the TPU worker is not", marks=pytest.mark.nightly),
        pytest.param(1, "raise ValueError('a bug')", (1,), f"process 1 on {HERE}: a bug", marks=pytest.mark.nightly),
        pytest.param(0, "raise ValueError('a bug')", (1,), f"process 0 on {HERE}: a bug", marks=pytest.mark.nightly),
    ],
)
def test_no_process_outlives_another(who, happens, codes, message, tmp_path):
    # Gloo may abort a process of two devices that see at different moments that another process has gone.
    _, _, err = end(processes := start(tmp_path, devices=1, happens={who: happens}))[1 - who]
    assert processes[1 - who].returncode in codes, err
    assert re.search(message, err)
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_device_that_is_lost_is_one_message_and_another_start_goes_on(finished, tmp_path):
    ((code, _, err),) = end(start(tmp_path, "--checkpoint-every-steps", "4", count=1, devices=1, happens={0: LOST}))
    assert code == 75, err
    assert "error: a device or another process is lost: UNAVAILABLE: the TPU worker is not reachable. Started" in err
    assert "Traceback" not in err
    train(dataclasses.replace(finished, run_dir=str(tmp_path / "run"), checkpoint_every_steps=4))
    assert_ended_alike(tmp_path / "run", finished.run_dir)


# The kernel ends a data worker, which holds images, before all else.
WORKER_KILLED = """from tnt_jax.data import workers
        for worker in list(workers.Worker.all): worker._process.kill()"""
COLLECTED = """
from tnt_jax.data import workers
workers.Worker.all = []
begin = workers.Worker.__init__
workers.Worker.__init__ = lambda self, *of: (begin(self, *of), workers.Worker.all.append(self))[0]
"""


@pytest.mark.slow
def test_a_data_worker_that_is_killed_is_a_reason_to_start_again(tmp_path):
    flags = ["--data.num-workers", "1"]
    ((code, _, err),) = end(
        start(tmp_path, *flags, count=1, devices=1, happens={0: WORKER_KILLED}, before={0: COLLECTED})
    )
    assert code == 75, err
    assert "error: a data worker was killed by SIGKILL; memory may have run out" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: Accelerator device halted prematurely"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel"), False),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
        (ValueError("a bug"), False),
        (WorkerError("a data worker failed"), False),
        (InputError("digits"), False),
    ],
)
def test_what_another_start_may_mend(error, lost):
    with pytest.raises(LostError if lost else type(error)), joined(DistributedConfig(), Signals(False)):
        raise error


def process_alone(*flags, **environment):
    """Exit code and standard error of one process, which waits for two seconds."""
    command = [sys.executable, "-c", ALONE_RUN, "--distributed.timeout=2", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


# What a run does first, without the run.
ALONE_RUN = """
import sys
from tnt_jax.commands.cli import command, training_config
from tnt_jax.training.hosts import joined
from tnt_jax.training.signals import Signals
@command
def main():
    with joined(training_config(sys.argv[1:]).distributed, Signals(False)) as hosts:
        print("alone" if hosts.count == 1 else hosts.count)
main()
"""


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_in_vain_says_so_and_is_started_again(index):
    address = f"127.0.0.1:{free_port()}"
    given = {"coordinator": address, "num-processes": 2, "process-id": index}
    code, out, err = process_alone(*(f"--distributed.{name}={value}" for name, value in given.items()))
    assert code == 75
    assert f"process {index} of 2 on {socket.gethostname()} starts" in out
    assert f"error: waited 2 s for 2 processes at {address}, and not all came" in err


OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "PRTE_LAUNCHED": "1"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "flags", "code", "words"),
    [
        (
            OPEN_MPI_5,
            [],
            2,
            "mpirun has started 2 processes, and JAX does not find them: add --distributed.coordinator",
        ),
        (
            TORCHRUN,
            [],
            2,
            "torchrun has started 2 processes, and JAX does not find them: add --distributed.coordinator",
        ),
        (TORCHRUN, ["--distributed.num-processes=1"], 0, "alone"),
        (TORCHRUN | {"WORLD_SIZE": "1"}, [], 0, "alone"),
        (SLURM | {"SLURM_NTASKS": ""}, [], 2, "JAX cannot find out which processes there are (ValueError"),
        (SLURM | {"SLURM_NTASKS": "4"}, [], 75, "--distributed.num-processes 1 trains alone"),
        (TORCHRUN, ["--distributed.coordinator=127.0.0.1:{port}"], 75, "waited 2 s for 2 processes at 127.0.0.1"),
    ],
)
def test_several_processes_of_a_launcher_join_or_are_told_how_and_none_trains_alone_in_silence(
    environment, flags, code, words
):
    flags = [flag.format(port=free_port()) for flag in flags]
    found, out, err = process_alone(*flags, **environment)
    assert found == code, err
    assert words in out + err
    assert "Traceback" not in err


def test_a_pod_that_may_not_ask_kubernetes_says_what_to_write(tmp_path):
    (tmp_path / "kubernetes").mkdir()
    refuses = "class config:\n    @staticmethod\n    def load_incluster_config(): raise RuntimeError('no token')\n"
    (tmp_path / "kubernetes/__init__.py").write_text(refuses)
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    code, _, err = process_alone(**pod, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert code == 2
    assert "RuntimeError: no token). --distributed.num-processes 1 trains alone" in err


def test_a_jax_that_has_them_elsewhere_is_a_message(monkeypatch):
    """What JAX asks of a cluster, and its key-value store, have no public name."""
    monkeypatch.setitem(sys.modules, "jax._src.clusters", None)
    with pytest.raises(
        InputError, match=r"JAX cannot find out which processes there are .*num-processes 1 trains alone"
    ):
        _detected(1)
    monkeypatch.setitem(sys.modules, "jax._src.distributed", None)
    with pytest.raises(InputError, match=r"has its key-value store elsewhere .* requirements\.txt"):
        Hosts(0, 2)


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
    """Two processes of one device, each with flags of its own."""
    port, processes = free_port(), []
    for index, own in enumerate(flags):
        told = {"coordinator": f"127.0.0.1:{port}", "num-processes": 2, "process-id": index}
        command = [sys.executable, "train.py", "--config", config_file(folder), "--run-dir", str(folder / "run"), *own]
        command += [f"--distributed.{name}={value}" for name, value in told.items()]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": devices_of_each(1)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    return end(processes)


@pytest.mark.slow
def test_processes_of_two_configurations_do_not_train_together(tmp_path):
    results = start_two(tmp_path, ["--seed", "0"], ["--seed", "5", "--optimizer.learning-rate", "0.05"])
    assert [code for code, _, _ in results] == [2, 2], results
    for _, _, err in results:
        assert (
            "is of another run: config.optimizer.learning_rate is 0.05 here and 0.005 on process 0; config.seed" in err
        )
        assert "Traceback" not in err
    assert f"process 1 on {socket.gethostname()}: this process" in results[0][2]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_facts_of_any_size_and_of_other_names_are_compared(tmp_path):
    """More weights than a message may have, and a field that one process alone knows."""
    code = """from tnt_jax.training import loop
facts = loop.facts
loop.facts = lambda config: facts(config) | {{"config.weights": str([{value}] * 100_000)}} | {more}"""
    before = [code.format(value=value, more=more) for value, more in ((1.5, "{}"), (2.5, "{'config.other': 'x'}"))]
    results = end(start(tmp_path, before=dict(enumerate(before))))
    assert [code for code, _, _ in results] == [2, 2], results
    for _, _, err in results:
        assert "config.other is x here and missing on process 0; config.weights is [2.5, 2.5" in err


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
        assert "this process reads other data: file names of the training images is" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
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
    processes[1].send_signal(number)
    results = end(processes)
    assert {code for code, _, _ in results} == {75 if number == signal.SIGTERM else 130}, results
    assert "process 1 on" in results[0][2]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "task"), [("position", "regression"), pytest.param("shapes", "multi_label", marks=pytest.mark.nightly)]
)
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
    assert one.pop("split") == two.pop("split") == "validation"
    assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


# A process whose disk does not show it the newest checkpoint yet, as NFS does for half a minute; or not for a while.
NOT_SEEN = """
import pathlib
is_dir = pathlib.Path.is_dir
pathlib.Path.is_dir = lambda path: not (path.parent.name == "checkpoints" and path.name.isdecimal()) and is_dir(path)"""
SEEN_LATE = """
from tnt_jax.training import loop
is_run, looks = loop.is_run, []
loop.is_run = lambda folder: len(looks) > 3 and is_run(folder) if not looks.append(folder) else None"""


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_step_that_one_process_does_not_see_ends_both_at_once_and_nothing_is_renamed(who, finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    results = end(start(tmp_path, "--epochs", "4", before={who: NOT_SEEN}))
    assert [code for code, _, _ in results] == [75, 75], results
    assert "has no checkpoint of step 33" in results[who][2]
    assert "step 33" in results[1 - who][2]
    assert not any("damaged" in path.name for path in (tmp_path / "run/checkpoints").iterdir())


@pytest.mark.nightly
def test_a_run_folder_that_is_seen_late_is_waited_for(tmp_path):
    assert [code for code, _, _ in end(start(tmp_path, "--epochs", "1", before={1: SEEN_LATE}))] == [0, 0]


# Days pass, and have not, between two looks at the clock.
JUMPING_CLOCK = """
import itertools
truth, looks = time.time, itertools.count()
time.time = lambda: truth() + next(looks) % 2 * 60 * 86400"""
FULL_DISK = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True  # a compiled module would be cut short without a word
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))"""


@pytest.mark.nightly  # one process has it in test_checkpoint.py
def test_a_clock_that_jumps_harms_no_checkpoint(tmp_path):
    flags = ["--epochs", "1", "--checkpoint-every-steps", "4"]
    results = end(start(tmp_path, *flags, devices=1, before={0: JUMPING_CLOCK, 1: JUMPING_CLOCK}))
    assert [code for code, _, _ in results] == [0, 0], results


@pytest.mark.nightly
@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_one_process_that_cannot_write_ends_both_at_once(who, tmp_path):
    results = end(start(tmp_path, "--checkpoint-every-steps", "4", devices=1, before={who: FULL_DISK}))
    assert [code for code, _, _ in results] == [1, 1], results
    assert "error: a checkpoint cannot be written into" in results[who][2]
    assert "Traceback" not in results[who][2]
