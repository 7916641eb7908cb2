"""The script that starts a run again, with small commands in the place of the run, and with two real processes."""

import os
import signal
import subprocess
import sys

import pytest
from commands import ROOT
from small_runs import config_file, free_port, metrics_of

SCRIPT = [sys.executable, str(ROOT / "launch/keep_running.py")]
# Ends with the next code of a list each time that it is started.
CODES = """
import os, pathlib, signal, sys
path = pathlib.Path(sys.argv[1])
code, *rest = path.read_text().split()
path.write_text(" ".join(rest))
if int(code) < 0:
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


def keep(tmp_path, codes, *options):
    (tmp_path / "codes").write_text(codes)
    command = [*SCRIPT, "--wait", "0.01", *options, "--", sys.executable, "-c", CODES, str(tmp_path / "codes")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("final", [0, 1, 2, 130])
def test_it_starts_again_after_everything_but_these(final, tmp_path):
    done = keep(tmp_path, f"75 -9 143 139 134 3 255 {final} 75")
    assert done.returncode == final
    assert (tmp_path / "codes").read_text() == "75"
    assert [line.split(";")[0] for line in done.stderr.splitlines()] == [
        f"keep_running: exit code {code}" for code in (75, 137, 143, 139, 134, 3, 255)
    ]


def test_its_starts_are_bounded_and_each_waits_twice_as_long(tmp_path):
    done = keep(tmp_path, "75 75 75 75 75", "--starts", "4", "--wait", "0.25")
    assert done.returncode == 75
    assert (tmp_path / "codes").read_text() == "75"
    waits = [line.rpartition(" in ")[2] for line in done.stderr.splitlines()]
    assert waits[:3] == ["0.25 s", "0.5 s", "1 s"]
    assert "this was start 4 of 4" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_ends_it_is_passed_on_and_nothing_is_started_again(number, tmp_path):
    code = "import signal, sys, time\nfor n in (2, 15): signal.signal(n, lambda *_: sys.exit(75))\n"
    code += "print('up', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([*SCRIPT, "--", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(timeout=20) == 75


def test_it_ends_while_it_waits(tmp_path):
    (tmp_path / "codes").write_text("75 75")
    command = [*SCRIPT, "--wait", "100", "--", sys.executable, "-c", CODES, str(tmp_path / "codes")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert "exit code 75; start 2 of at most 100 in 100 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_a_command_that_is_not_there():
    done = subprocess.run([*SCRIPT, "--", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no-such-command" in done.stderr
    assert subprocess.run(SCRIPT, capture_output=True).returncode == 2


# train.py, which is killed as by the kernel when it has taken its fifth step, the first time.
KILLED = """
import os, pathlib, runpy, signal, sys
from tnt_jax.training import run
take_step, mark, taken = run.Run.train_step, pathlib.Path(sys.argv.pop(1)), []
def train_step(self, state, batch):
    taken.append(1)
    if len(taken) == 5 and {dies} and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, state, batch)
run.Run.train_step = train_step
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [0, 1])
def test_machines_whose_neighbour_was_killed_by_the_kernel_go_on_with_it(victim, tmp_path):
    port, processes = free_port(), []
    for index in range(2):
        code = KILLED.format(dies=index == victim)
        flags = ["--config", config_file(tmp_path), "--run-dir", str(tmp_path / "run")]
        told = {"coordinator": f"127.0.0.1:{port}", "num-processes": 2, "process-id": index, "timeout": 60}
        flags += [f"--distributed.{name}={value}" for name, value in told.items()]
        command = [*SCRIPT, "--wait", "1", "--", sys.executable, "-c", code, str(tmp_path / "mark"), *flags]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
            )
        )
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "exit code 137" in errors[victim]
    assert any(f"exit code {code}" in errors[1 - victim] for code in (75, 134))
    assert metrics_of(tmp_path / "run")[-1]["step"] == 33
