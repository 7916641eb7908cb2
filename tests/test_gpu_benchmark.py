"""benchmarks/gpu.py, as far as it can be run without a GPU."""

import json
import os
import subprocess
import sys

import pytest
from commands import ROOT


def run(*arguments, **settings):
    command = [sys.executable, "benchmarks/gpu.py", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | settings
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_card_it_says_so():
    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("no NVIDIA GPU: JAX finds cpu; expected a card and jax[cuda13]")
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["part"] == "card"


@pytest.mark.nightly
def test_every_part_is_a_line_and_the_lines_are_tables(tmp_path):
    """In the least sizes. What needs a GPU says so; a part that fails, as timm without torchvision, costs itself."""
    out = tmp_path / "gpu.jsonl"
    done = run(
        "--smoke",
        "--out",
        out,
        "--parts",
        "kernel",
        "attention",
        "knobs",
        "timm",
        "model reference",
        "model cuda",
        "racecheck",
        "inner",
        "digits",
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["part"] for line in lines} >= {"card", "kernel", "attention", "knobs", "timm", "model reference train"}
    (plain, *_) = [line for line in lines if line.get("formulation") == "reference"]
    assert 1e-3 < plain["forward"] < 1e-2, "bfloat16"
    assert (plain["same_bits"], plain["right"], plain["over_plain"]) == (True, True, 1)
    refused = [line for line in lines if "cuda" in (line.get("formulation"), line.get("model"))]
    assert {line["not_run"] for line in refused} == {"the CUDA kernel runs on NVIDIA GPUs, and this is a cpu"}
    with out.open("a") as file:
        file.write(
            json.dumps({"estimate": "h100", "model": "reference", "which": "train", "least us": 2e3, "most us": 3e3})
        )
    tables = run("--tables", out).stdout
    assert "these numbers mean nothing" in tables
    assert "| tnt_s_patch16_224 | reference |" in tables
    (row,) = [row for row in tables.splitlines() if row.startswith("| train | reference |")]
    assert "2.00 to 3.00" in row


def test_a_part_that_hangs_is_ended_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    given = gpu.argparse.Namespace(batch=1, smoke=True, out=None)
    said = []
    assert gpu._child("kernel", 0.2, given, said.append) == []
    assert said[0]["failed"] == "took more than 0.2 s"


def test_after_its_minutes_it_ends_and_carried_packages_are_found(tmp_path):
    """With a package beside the project's own, which notes that a part began."""
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nos.environ['SEEN'] = 'carried'\n")
    done = run("--smoke", "--minutes", "0", "--parts", "kernel", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.returncode == 0, done.stderr
    *_, last = map(json.loads, done.stdout.splitlines())
    assert last == {"part": "kernel", "failed": "not begun: 0 minutes are over"}
