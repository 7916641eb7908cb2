"""Logs that are written while the machine misbehaves."""

import struct
import subprocess
import sys
import time

import pytest
from commands import ROOT
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tnt_jax.training.report import _TensorBoard


def events_in(folder):
    """The events of all files, in the order of their files."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def test_every_value_is_there_as_soon_as_it_is_written_also_when_the_clock_jumps(tmp_path, monkeypatch):
    log = _TensorBoard(tmp_path, 7)
    for step in range(50):
        monkeypatch.setattr(time, "time", lambda step=step: 1e9 + (-1) ** step * 3e6)
        log.write("train", step, {"loss": step / 2, "epoch": 1.0})
    events = events_in(tmp_path)
    assert (events[1].session_log.status, events[1].step) == (SessionLog.START, 8)
    values = [(event.step, each.tag, each.simple_value) for event in events for each in event.summary.value]
    assert values == [(step, "train/loss", step / 2) for step in range(50)]
    log.close()


def test_two_starts_in_a_second_write_two_files(tmp_path):
    for _ in range(2):
        log = _TensorBoard(tmp_path, 0)
        log.write("train", 1, {"loss": 1.0})
        log.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert sum(len(event.summary.value) for event in events_in(tmp_path)) == 2


def test_a_full_disk_is_said_at_once(tmp_path, monkeypatch):
    log = _TensorBoard(tmp_path, 0)

    def full(event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._writer, "write_event", full)
    with pytest.raises(OSError, match="No space left"):
        log.write("train", 1, {"loss": 1.0})


def test_no_run_imports_pytorch(tmp_path):
    code = f"""
import sys
from tnt_jax.training import loop, report
report._TensorBoard(__import__("pathlib").Path({str(tmp_path)!r}), 0)
assert "torch" not in sys.modules
import importlib.util
importlib.util.find_spec("torch")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
