"""`tnt-check` reads every image of all splits, and lists what cannot be read."""

import csv

import numpy as np
import pytest
from commands import run
from PIL import Image


@pytest.fixture
def table(tmp_path):
    """Twelve images in three splits, of which one is empty and one ends early."""
    rng, rows = np.random.default_rng(0), []
    for index in range(12):
        path = tmp_path / f"{index}.jpg"
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
        rows.append((path.name, ("a", "b")[index % 2], ("train", "validation", "test")[index % 3]))
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole[: len(whole) // 2])
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "split"), *rows])
    return tmp_path / "table.csv"


def test_what_cannot_be_read_is_listed_with_the_reason(table, tmp_path):
    code, out, _ = run("tnt_jax/commands/check.py", f"csv:{table}", "--out", tmp_path / "wrong.csv")
    assert code == 1
    assert out.splitlines()[-1] == "4 of train, 4 of validation, 4 of test: 1 cannot be read"
    ((split, image, reason),) = list(csv.reader((tmp_path / "wrong.csv").open()))[1:]
    assert (split, image) == ("train", str(tmp_path / "3.jpg"))
    assert "truncated" in reason.lower()
    assert reason in out


def test_all_can_be_read(table, tmp_path):
    (tmp_path / "3.jpg").write_bytes((tmp_path / "6.jpg").read_bytes())
    code, out, _ = run("tnt_jax/commands/check.py", f"csv:{table}")
    assert (code, out) == (0, "4 of train, 4 of validation, 4 of test: all can be read\n")


def test_training_names_the_command(table, tmp_path):
    code, _, err = run("train.py", "--data.source", f"csv:{table}", "--run-dir", tmp_path / "run", "--batch-size", "4")
    assert code == 2
    assert f"tnt-check csv:{table}" in err


def test_a_source_that_is_not_there_is_one_line():
    code, _, err = run("tnt_jax/commands/check.py", "csv:nowhere.csv")
    assert code == 2
    assert err.count("\n") == 1
