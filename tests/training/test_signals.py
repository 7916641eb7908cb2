"""Signals, where a command listens and where a notebook calls `train`."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from commands import ROOT

from tnt_jax.training import signals as signals_module
from tnt_jax.training.signals import Pauses, Signals, current_signals, signals


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_without_a_command_signals_are_left_alone_until_it_trains():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    listening = current_signals()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    pauses = Pauses(listening.received, 10, None)
    with listening.training():
        assert pauses.stop() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_for(pauses.stop) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012, it comes after the call
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_nothing_comes():
    listening = Signals(ends_process=False)

    def listen():
        with listening.training():
            pass

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert listening.received == []


def test_a_call_in_a_command_has_the_commands_signals():
    with signals():
        assert current_signals() is current_signals()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_command_that_computes_without_python_ends_at_once(number, code):
    code_ = "import hashlib\nfrom tnt_jax.training.signals import signals\n"
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


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass when they are told to."""
    seconds = [1000.0]
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: seconds[0])
    return seconds


def saves_of(pauses, clock, steps, seconds_of_save=0.0):
    """The steps of so many seconds each after which a run saves."""
    saved = []
    for step, seconds in enumerate(steps, 1):
        clock[0] += seconds
        pauses.stop()
        if pauses.is_save_due(step):
            saved.append(step)
            with pauses.saving():
                clock[0] += seconds_of_save
    return saved


def test_a_run_saves_by_minutes_and_by_steps(clock):
    assert saves_of(Pauses([], 10, None), clock, [60] * 35) == [10, 20, 30]
    assert saves_of(Pauses([], 10, 4), clock, [1] * 10) == [4, 8]


def test_saves_by_time_become_rarer_where_the_steps_wait_for_more_than_5_percent_of_it(clock):
    # 36 s are 5% of 12 minutes: after the first save, 12 minutes pass and not 10.
    assert saves_of(Pauses([], 10, None), clock, [60] * 40, seconds_of_save=36) == [10, 22, 34]


def test_several_processes_save_and_stop_by_what_all_of_them_say_every_few_seconds(clock, monkeypatch):
    from jax.experimental import multihost_utils

    others, asked = [0, 0, 1], []

    def process_allgather(row):
        asked.append(clock[0])
        return np.stack([row, np.array(others, np.int32)])

    monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)
    pauses = Pauses([], 1, None, processes=2)
    assert saves_of(pauses, clock, [0.5] * 200) == [101]
    assert len(asked) == 20  # every ten steps of half a second, and not after each
    assert pauses.stop() is None
    others[0] = signal.SIGTERM
    stops = [pauses.stop() for _ in range(20)]
    assert {*stops} == {None, signal.SIGTERM}
    others[0] = 0
    pauses = Pauses([signal.SIGTERM, signal.SIGINT], 10, None, processes=2)
    assert pauses.stop() == signal.SIGINT
