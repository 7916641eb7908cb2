"""Logs that are written while the machine misbehaves."""

import io
import json
import struct
import subprocess
import sys
import time

import pytest
import rich.console
from commands import ROOT
from small_runs import metrics_of, tiny_run

from tnt_jax.models.variants import complete
from tnt_jax.training import report as report_module
from tnt_jax.training.report import METRICS_FILE, Report, _TensorBoard


def events_in(folder):
    """The events of all files, in the order of their files."""
    from tensorboardX.proto.event_pb2 import Event  # which imports PyTorch, in every worker that collects this file

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
    assert (events[1].session_log.status, events[1].step) == (events[1].session_log.START, 8)
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


def test_images_per_second_are_those_of_a_clock(tmp_path, monkeypatch):
    """The first step is compiled and is left out; then 128 images take a quarter of a second."""
    clock = [100.0]
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: clock[0])
    config = complete(tiny_run(tmp_path, log_every_steps=2), 10)
    console = rich.console.Console(file=io.StringIO())
    with Report(config, console, 0, 8, 8, 0.0) as report:
        for step in range(1, 9):
            clock[0] += 40 if step == 1 else 0.25
            report.train(step, {"loss": 1.0, "accuracy": 0.5})
            report.flush()
    rates = {line["step"]: line["images_per_second"] for line in metrics_of(tmp_path) if line["kind"] == "train"}
    assert rates == pytest.approx({2: 512, 4: 512, 6: 512, 8: 512})


def test_lines_of_a_long_history_are_looked_at_once_each(tmp_path, monkeypatch):
    lines = [json.dumps({"kind": kind, "step": step}) for step in range(1, 501) for kind in ("train", "test")]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + '\n{"kind": "tra')
    looked, place_of = [], report_module._place_of
    monkeypatch.setattr(report_module, "_place_of", lambda line: looked.append(line) or place_of(line))
    report_module._reopen(tmp_path / METRICS_FILE, 400, evaluates_first=True).close()
    assert len(looked) == 1001
    assert (tmp_path / METRICS_FILE).read_text().splitlines() == lines[:799]
    assert (tmp_path / report_module.DROPPED_FILE).read_text().splitlines() == [*lines[799:], '{"kind": "tra']
