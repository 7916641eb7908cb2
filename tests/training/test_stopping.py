"""Signals, where a command listens and where a notebook calls `train`."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from commands import ROOT

from tnt_jax.training.stopping import Signals, current_signals, signals


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_without_a_command_signals_are_left_alone_until_it_trains():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    listening = current_signals()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with listening.training(several=False) as stop:
        assert stop() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_for(stop) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012, it comes after the call
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_nothing_comes():
    found = []

    def listen():
        with Signals(ends_process=False).training(several=False) as stop:
            found.append(stop())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_call_in_a_command_has_the_commands_signals():
    with signals():
        assert current_signals() is current_signals()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_command_that_computes_without_python_ends_at_once(number, code):
    code_ = "import hashlib\nfrom tnt_jax.training.stopping import signals\n"
    # As compiling: one call, a minute long, in which Python runs no handler.
    code_ += "with signals():\n    print('up', flush=True)\n    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    process = subprocess.Popen(
        [sys.executable, "-c", code_], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert "nothing was begun" in err
