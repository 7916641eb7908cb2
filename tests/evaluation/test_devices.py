"""What goes over all images of a source gives the same on several devices as on one, of runs and of model folders."""

import csv
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import ROOT
from commands import run as run_command

import tnt_jax
from tnt_jax.config import DataConfig
from tnt_jax.data.opening import open_split
from tnt_jax.evaluation.evaluate import predictions_of


def test_the_suite_has_several_devices():
    assert jax.device_count() in (3, 4)


def test_a_run_is_evaluated_as_image_by_image(run):
    model = tnt_jax.load_model(run)
    data = DataConfig("digits", crop=1.0)
    source = open_split(data, "test")
    (predictions,) = predictions_of([model], source, data, batch_size=50)  # 50 is no multiple of 3 or 4
    assert len(predictions.labels) == len(source) == 360
    for index in range(0, 360, 60):
        scores = tnt_jax.inference_model(model, source.images[index])["pred_scores"]
        np.testing.assert_allclose(predictions.scores[index], np.sort(scores)[::-1][:5], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["eval.py"],
        ["eval.py", "--explain", "grad-cam", "--images", "9"],
        ["visualize.py", "confusion"],
        *(
            pytest.param(words, marks=pytest.mark.nightly)
            for words in (["eval.py", "--probe", "knn"], ["visualize.py", "mistakes"], ["visualize.py", "tsne"])
        ),
    ],
)
def test_every_command_over_images_takes_a_run(arguments, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, *flags = arguments
    given = [*flags, run] if script == "visualize.py" else [run, *flags]
    code, _, err = run_command(script, *given)
    assert code == 0, err


@pytest.mark.slow
def test_three_devices_give_what_these_give(run, tmp_path):
    """By the command, as a user would type it."""
    code, _, err = run_command("eval.py", run, "--out", tmp_path / "here.csv")
    assert code == 0, err
    flags = "--xla_force_host_platform_device_count=3 --xla_backend_optimization_level=0"
    command = [sys.executable, ROOT / "eval.py", run, "--out", tmp_path / "three.csv"]
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, check=True)
    here, three = ([*csv.DictReader((tmp_path / name).open())] for name in ("here.csv", "three.csv"))
    assert [row["pred_label"] for row in here] == [row["pred_label"] for row in three]
    np.testing.assert_allclose(*([float(row["pred_score"]) for row in rows] for rows in (here, three)), rtol=1e-4)


def test_any_batch_size_is_taken_and_the_split_is_named(run, tmp_path):
    code, _, err = run_command("eval.py", run, "--split", "train", "--table", tmp_path / "t.csv", "--batch-size", "7")
    assert code == 0, err
    assert {row["split"] for row in csv.DictReader((tmp_path / "t.csv").open())} == {"train"}
    assert ", train: " in err
