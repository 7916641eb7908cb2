"""Each task from images to a trained model, its figure set beforehand, and every command that follows it."""

import csv
import dataclasses
import json

import commands
import generated
import numpy as np
import pytest
from PIL import Image

import tnt_jax
from tnt_jax.storage.description import read_description
from tnt_jax.training.loop import train


@pytest.fixture(autouse=True)
def _sources(monkeypatch):
    generated.install(monkeypatch)


@pytest.mark.nightly
def test_labels_of_shapes_are_found(tmp_path, monkeypatch):
    """mAP of at least 0.95."""
    generated.install(monkeypatch, generated.COUNTS | {"train": 4096})
    scores = train(generated.run_of(tmp_path / "run", "shapes", "multi_label", epochs=20))
    assert scores["ema_map"] >= 0.95


@pytest.mark.nightly
def test_a_position_is_found(tmp_path):
    """R2 of at least 0.95, of two targets in units of their own."""
    scores = train(generated.run_of(tmp_path / "run", "position", "regression", epochs=12))
    assert scores["ema_r2"] >= 0.95
    outputs = read_description(tmp_path / "run").outputs
    targets = generated.position(generated.COUNTS["train"], 0).targets
    np.testing.assert_allclose(outputs.target_mean, targets.mean(0), rtol=1e-6)
    source = generated.position(50, 5)
    model = tnt_jax.load_model(tmp_path / "run")
    found = tnt_jax.inference_model(model, list(source.images))
    depths = np.array([result["pred_values"]["depth"] for result in found])
    assert np.corrcoef(depths, source.targets[:, 0])[0, 1] > 0.97
    assert abs(depths.mean() - source.targets[:, 0].mean()) < 30  # of 1,000 to 1,700


@pytest.mark.nightly
def test_what_is_rare_is_found_where_it_is_sampled(tmp_path):
    """1:50: a macro recall higher by at least 10 points than without."""
    runs = {"natural": {}, "sampled": {"sampling": "balanced"}, "between": {"sampling": "sqrt"}}
    recall = {
        name: train(generated.run_of(tmp_path / name, "rare", "single_label", **changes))["ema_macro_recall"]
        for name, changes in runs.items()
    }
    assert recall["sampled"] >= recall["natural"] + 0.1
    assert recall["between"] >= recall["natural"] + 0.1


SMALL = dataclasses.replace(generated.MODEL, depth=1, outer_dim=24)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of labels and one of numbers, and where their images lie."""
    made = {}
    for name, task in (("shapes", "multi_label"), ("position", "regression")):
        folder = tmp_path_factory.mktemp(name)
        config = generated.run_of(folder / "run", name, task, epochs=2, model=SMALL)
        data = dataclasses.replace(config.data, source=generated.write_table(folder, name))
        train(dataclasses.replace(config, data=data))
        made[name] = folder
    return made


def run(script, *arguments):
    code, out, err = commands.run(script, *arguments)
    assert code == 0, err
    return out


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_in_every_command(runs, tmp_path):
    folder = runs["shapes"]
    table = tmp_path / "table.csv"
    files = ("--out", tmp_path / "a.jsonl", "--table", table)
    out = run("eval.py", folder / "run", "--split", "validation", "--per-class", *files)
    assert "mAP" in out
    assert "threshold" in out
    (averaged, raw) = csv.DictReader(table.open())
    scores = json.loads((folder / "run/checkpoints/scores.json").read_text())["8"]
    assert float(averaged["map"]) == pytest.approx(scores["ema_map"], abs=1e-6)
    assert float(raw["macro_f1"]) == pytest.approx(scores["raw_macro_f1"], abs=1e-6)
    assert float(averaged["map_low"]) < float(averaged["map"]) < float(averaged["map_high"])
    predictions = rows_of(tmp_path / "a.jsonl")
    assert len(predictions) == 2 * generated.FEW["validation"]
    image = folder / "images/validation3.png"
    (line,) = run("predict.py", folder / "run", image, "--format", "jsonl").splitlines()
    prediction = predictions[3]
    assert prediction["image"] == "images/validation3.png"
    assert "|".join(json.loads(line)["pred_classes"]) == prediction["pred_classes"]
    header, values = run("predict.py", folder / "run", image, "--format", "csv").splitlines()
    assert header.startswith("image,classes,label_1,class_1,score_1,")
    assert values.split(",")[1] == prediction["pred_classes"]
    assert "yes" in run("predict.py", folder / "run", image) or prediction["pred_classes"] == ""


def test_numbers_in_every_command(runs, tmp_path):
    folder = runs["position"]
    files = ("--out", tmp_path / "a.csv", "--table", tmp_path / "table.csv")
    run("eval.py", folder / "run", "--split", "validation", "--per-class", *files)
    averaged = next(csv.DictReader((tmp_path / "table.csv").open()))
    scores = json.loads((folder / "run/checkpoints/scores.json").read_text())["8"]
    for name in ("r2", "rmse", "mae", "loss"):
        assert float(averaged[name]) == pytest.approx(scores[f"ema_{name}"], rel=1e-4)
    first = next(csv.DictReader((tmp_path / "a.csv").open()))
    header, values = run(
        "predict.py", folder / "run", folder / "images/validation0.png", "--format", "csv"
    ).splitlines()
    assert header == "image,depth,angle"
    depth = float(dict(zip(header.split(","), values.split(","), strict=True))["depth"])
    assert depth == pytest.approx(float(first["pred_depth"]), rel=1e-5)
    assert 1000 < depth < 1800
    code, _, err = commands.run("eval.py", folder / "run", "--probe", "knn")
    assert code == 2
    assert "is regression, and --probe asks for classes" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "position"])
def test_pictures_follow_the_task(name, runs, tmp_path):
    for what in ("confusion", "mistakes", "curves", "batch"):
        run("visualize.py", what, runs[name] / "run", "--out", tmp_path / "a.png")
        assert np.asarray(Image.open(tmp_path / "a.png")).std() > 5


@pytest.mark.slow
def test_a_calibrated_model_has_thresholds_and_is_no_less_probable(runs, tmp_path):
    import sys

    from tnt_jax.commands import calibrate

    folder = runs["shapes"]
    arguments = ["calibrate", str(folder / "run"), "--out", str(tmp_path / "calibrated")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        calibrate.main()
    described = read_description(tmp_path / "calibrated")
    assert len(described.outputs.thresholds) == 4
    source = f"csv:{folder / 'table.csv'}"
    tables = [tmp_path / "before.csv", tmp_path / "after.csv"]
    run("eval.py", folder / "run", "--table", tables[0])
    run("eval.py", tmp_path / "calibrated", "--source", source, "--table", tables[1])
    before, after = (next(csv.DictReader(table.open())) for table in tables)
    assert float(after["map"]) == pytest.approx(float(before["map"]), abs=1e-6)  # the order is the same
    assert float(after["loss"]) < float(before["loss"]) + 0.02
    result = tnt_jax.inference_model(tmp_path / "calibrated", folder / "images/test0.png")
    wanted = np.flatnonzero(result["pred_scores"] >= described.outputs.thresholds)
    assert result["pred_labels"] == wanted.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "position"])
def test_an_exported_file_says_what_the_model_says(name, runs, tmp_path):
    folder = runs[name]
    run("export.py", folder / "run", "--format", "stablehlo", "--out", tmp_path / "a.stablehlo")
    described = json.loads((tmp_path / "a.stablehlo.json").read_text())
    import jax

    call = jax.export.deserialize(bytearray((tmp_path / "a.stablehlo").read_bytes())).call
    image = np.asarray(Image.open(folder / "images/test0.png"))[None, ..., None]
    (outputs,) = np.asarray(call(image))
    result = tnt_jax.inference_model(folder / "run", image[0])
    if name == "shapes":
        assert (described["task"], described["output"]["name"]) == ("multi_label", "logits")
        np.testing.assert_allclose(1 / (1 + np.exp(-outputs)), result["pred_scores"], rtol=1e-4)
    else:
        assert (described["task"], described["output"]["name"]) == ("regression", "values")
        np.testing.assert_allclose(outputs, list(result["pred_values"].values()), rtol=1e-5)


@pytest.mark.slow
def test_a_run_that_starts_from_a_regression_says_the_same_in_other_units(runs, tmp_path):
    from tnt_jax.models.variants import resolve
    from tnt_jax.storage.folder import model_from_parameters
    from tnt_jax.storage.load import load_model, open_for
    from tnt_jax.tasks.task import Outputs

    model = load_model(runs["position"] / "run")
    names = model.description.class_names
    wanted = Outputs("regression", target_mean=(3.0, 0.5), target_std=(20.0, 0.1))
    config = resolve(dataclasses.replace(SMALL, num_classes=2))
    again = model_from_parameters(config, open_for(runs["position"] / "run", config, names, "csv:x", outputs=wanted))
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 1)).astype(np.float32)
    before = np.asarray(model(images)) * model.description.outputs.target_std + model.description.outputs.target_mean
    after = np.asarray(again(images)) * wanted.target_std + wanted.target_mean
    np.testing.assert_allclose(after, before, rtol=1e-4)


@pytest.mark.slow
def test_a_head_of_another_task_is_fresh_and_that_is_said(runs, caplog):
    from tnt_jax.models.variants import resolve
    from tnt_jax.storage.load import open_for

    config = resolve(dataclasses.replace(SMALL, num_classes=4))
    with caplog.at_level("WARNING"):
        parameters = open_for(runs["shapes"] / "run", config, generated.SHAPES, "csv:x")
    assert "its outputs are of task multi_label, and single_label is wanted: the head is fresh" in caplog.text
    assert not np.asarray(parameters["head.bias"]).any()


@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_the_metric_that_was_chosen(tmp_path):
    config = generated.run_of(tmp_path / "run", "position", "regression", epochs=3, model=SMALL)
    config = dataclasses.replace(config, eval_every_epochs=1, keep_checkpoints=3, best_metric="mae")
    train(config)
    scores = json.loads((tmp_path / "run/checkpoints/scores.json").read_text())
    assert len(scores) == 3
    worst = max(scores, key=lambda step: scores[step]["ema_mae"])
    scores[worst]["ema_mae"] = 0.0
    (tmp_path / "run/checkpoints/scores.json").write_text(json.dumps(scores))
    assert tnt_jax.load_model(tmp_path / "run").description.source["step"] == int(worst)
