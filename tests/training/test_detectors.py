"""Boxes of digits in scenes, from COCO's JSON to a trained model, and every command that follows it."""

import csv
import dataclasses
import json
import sys

import dense_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_runs import (
    FEW,
    SMALL_PYRAMID,
    assert_goes_on_exactly,
    assert_same_step,
    learned,
    outputs_when_saved_again,
    run,
    write_few,
)
from flax import nnx
from PIL import Image

import tnt_jax
from benchmarks.scenes import scenes, write
from tnt_jax.config import InputError, LossConfig, ModelChanges, OptimizerConfig, check
from tnt_jax.inference import predict_images
from tnt_jax.models import detectors
from tnt_jax.models.adapting import select_classes
from tnt_jax.storage.description import read_description
from tnt_jax.storage.folder import model_from_parameters, model_parameters
from tnt_jax.tasks.detection import MOST_BOXES
from tnt_jax.training.loop import train
from tnt_jax.training.run import Run

SMALL = dataclasses.replace(dense_runs.SMALL, head="retinanet")


def run_of(folder, source, model=SMALL, **changes):
    moves = {"scale_jitter": (0.8, 1.3)}
    return dense_runs.run_of(folder, f"coco:{source}", "detection", model, moves, **changes)


@pytest.fixture(scope="module", autouse=True)
def few_layers():
    """DETR with 2 + 2 layers, RetinaNet with one convolution before the last: a third of the time to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "LAYERS", 2)
        patch.setattr(detectors, "CONVS", 1)
        yield


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_few(tmp_path_factory)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("retinanet", marks=pytest.mark.slow),
        pytest.param("detr", marks=pytest.mark.nightly),
        pytest.param("pyramid", marks=pytest.mark.nightly),
    ],
)
def finished(request, few, tmp_path_factory):
    """A run of each head; `retinanet` of a TNT and of a PyramidTNT."""
    model = dataclasses.replace(SMALL, head="retinanet" if request.param == "pyramid" else request.param)
    if request.param == "detr":
        model = dataclasses.replace(model, head_drop_rate=0.1)
    if request.param == "pyramid":
        model = dataclasses.replace(SMALL_PYRAMID, head="retinanet")
    config = run_of(tmp_path_factory.mktemp(request.param) / "run", few, model)
    train(config)
    return config


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(finished, tmp_path):
    assert_goes_on_exactly(finished, tmp_path / "run")


def test_a_model_is_described_saved_and_loaded_with_its_head(finished, tmp_path):
    described = read_description(finished.run_dir)
    assert (described.config.head, described.outputs.task) == (finished.model.head, "detection")
    outputs = outputs_when_saved_again(finished.run_dir, tmp_path / "model")
    assert outputs.shape[-1] == 10 + (5 if finished.model.head == "detr" else 8)


def step_of(config, devices):
    """Loss and parameters after a step on so many devices."""
    images, _, boxes = scenes("train", config.batch_size)
    labels = np.full((config.batch_size, 1 + MOST_BOXES, 7), -1, np.float32)
    for label, of_image in zip(labels[2:], boxes, strict=False):  # the first two have none
        for row, (left, top, width, height, digit) in zip(label[1:], of_image, strict=False):
            row[:] = (left / 64, top / 64, (left + width) / 64, (top + height) / 64, digit, 0, width * height)
    return dense_runs.step_of(config, 10, images, labels, devices)


@pytest.mark.nightly
@pytest.mark.parametrize("head", ["detr", "retinanet", "detr_unpooled"])
def test_a_step_is_the_same_on_several_devices(head, few, tmp_path):
    model = dataclasses.replace(SMALL, head=head, drop_path_rate=0.0)
    config = run_of(tmp_path, few, model, optimizer=OptimizerConfig(name="sgd", learning_rate=1e-3, warmup_epochs=0))
    assert_same_step(step_of(config, 1), step_of(config, 4))


@pytest.mark.nightly
def test_bfloat16_trains(few, tmp_path):
    model = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="bfloat16")
    loss, _ = step_of(run_of(tmp_path, few, model, loss=LossConfig("detection_giou")), 1)
    assert np.isfinite(loss)


def test_a_run_starts_from_a_detector_of_other_classes(finished, few, tmp_path):
    """The blocks and the pyramid are kept, what gives the classes is fresh."""
    folder = tmp_path / "two"
    write(folder, {"train": 32, "val": 4})
    for name in ("train", "val"):
        path = folder / f"annotations/instances_{name}.json"
        content = json.loads(path.read_text())
        content["categories"] = [{"id": 0, "name": "even"}, {"id": 1, "name": "odd"}]
        for each in content["annotations"]:
            each["category_id"] %= 2
        path.write_text(json.dumps(content))
    config = dataclasses.replace(finished, run_dir=str(tmp_path / "run"), init_from=finished.run_dir)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=f"coco:{folder}"))
    begun = Run(config).initial_state().params
    before = nnx.to_pure_dict(nnx.state(tnt_jax.load_model(finished.run_dir)))
    same = jax.tree_util.tree_map_with_path(
        lambda path, ours: bool(np.array_equal(ours, dict(jax.tree_util.tree_leaves_with_path(before))[path])), begun
    )
    fresh = {
        ".".join(str(key.key) for key in path) for path, kept in jax.tree_util.tree_leaves_with_path(same) if not kept
    }
    part = "decoder.classes.last" if finished.model.head == "retinanet" else "decoder.classes"
    assert fresh == {f"{part}.kernel", f"{part}.bias"}


def test_classes_are_chosen_in_another_order(finished):
    model = tnt_jax.load_model(finished.run_dir)
    parameters, config = select_classes(model_parameters(model), model.config, np.array([3, 0]))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 1)), jnp.float32)
    before, after = (
        np.asarray(nnx.jit(lambda each: each(images))(each))
        for each in (model, model_from_parameters(config, parameters))
    )
    np.testing.assert_allclose(after[..., :2], before[..., [3, 0]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after[..., 2:], before[..., 10:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_command(finished, few, tmp_path):
    folder, table = finished.run_dir, tmp_path / "table.csv"
    run("eval.py", folder, "--per-class", "--table", table, "--out", tmp_path / "a.jsonl")
    averaged, _ = csv.DictReader(table.open())
    assert {"ap", "ap50", "ar100", "loss"} <= set(averaged)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2 * FEW["test"]
    image = few / "test/images/0003.png"
    out = run("predict.py", folder, image, "--format", "jsonl", "--out", tmp_path / "boxes")
    for box in json.loads(out)["boxes"]:
        assert min(box["bbox"]) >= 0
        assert box["class"] == str(box["category_id"])
    assert Image.open(tmp_path / "boxes/0003_boxes.png").size == (64, 64)
    large = np.tile(np.asarray(Image.open(image)), (2, 3))
    (found,) = predict_images(tnt_jax.load_model(folder), [large], zoom=2.5)
    assert found["pred_boxes"].shape == (len(found["pred_labels"]), 4)


@pytest.mark.nightly
def test_pictures_and_files(finished, few, tmp_path):
    folder = finished.run_dir
    for what in ("confusion", "curves", "batch"):
        run("visualize.py", what, folder, "--out", tmp_path / "a.png")
        assert np.asarray(Image.open(tmp_path / "a.png")).std() > 5
    run("export.py", folder, "--format", "onnx", "--out", tmp_path / "a.onnx")
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 1)).astype(np.float32)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.get_outputs()[0].shape[-1] == tnt_jax.load_model(folder)(images).shape[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ModelChanges("tnt_s_patch16_224")},
            r"model\.head is class, and must be retinanet or detr or detr_unpooled for",
        ),
        (
            {"data": {"task": "single_label"}},
            r"model\.head is retinanet, and must be class for data\.task single_label",
        ),
        (
            {"data": {"mixup": 0.2}},
            r"data\.mixup is 0\.2, which only .* can have; for data\.task detection it must be 0",
        ),
        (
            {"loss": LossConfig(class_weights=(1.0,) * 10)},
            r"loss\.class_weights is .*, and must be none for",
        ),
        ({"loss": LossConfig("cross_entropy")}, r"must be detection or detection_giou"),
        (
            {"loss": LossConfig("detection_giou"), "model": {"head": "detr"}},
            r"loss\.name is 'detection_giou', and must be detection for data\.task detection with model\.head detr",
        ),
    ],
)
def test_what_a_configuration_cannot_have_is_said(changes, message, few):
    config = run_of("unused", few)
    given = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(config, **given))


def test_without_the_evaluator_the_run_does_not_start(few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"pip install tnt-jax\[coco\]"):
        train(run_of(tmp_path / "run", few))
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ptnt_ti_patch16_192", {"head": "detr"}, "head detr reads the sentences of a TNT"),
        ("tnt_ti_patch16_224", {"head": "detr", "outer_dim": 48}, "heads of 32 channels, and outer_dim is 48"),
        ("tnt_ti_patch16_224", {"head_drop_rate": 0.1}, "head_drop_rate is 0.1, and head class has no dropout"),
        ("tnt_ti_patch16_224", {"head": "retinanet", "head_drop_rate": 0.1}, "head retinanet has no dropout"),
    ],
)
def test_a_head_that_a_network_cannot_have(name, changes, message):
    with pytest.raises(InputError, match=message):
        tnt_jax.create_model(name, **changes)


@pytest.mark.slow
def test_digits_in_scenes_are_found(tmp_path):
    """AP50 at least 0.75, after one look at 1,600 scenes."""
    write(tmp_path / "scenes", {"train": 1600, "val": 150})
    assert learned("digit_boxes", f"coco:{tmp_path}/scenes", tmp_path / "run", "--epochs", 1)["ema_ap50"] >= 0.75


DETR = ("detr", "--optimizer.learning-rate", 2e-3, "--optimizer.ema-decay", 0.99, "--epochs", 12)


@pytest.mark.nightly
@pytest.mark.parametrize("head", [("retinanet",), DETR], ids=["retinanet", "detr"])
def test_digits_in_scenes_are_found_well(head, tmp_path):
    write(tmp_path / "scenes", {"train": 4000, "val": 300})
    scores = learned("digit_boxes", f"coco:{tmp_path}/scenes", tmp_path / "run", "--model.head", *head)
    assert scores["ema_ap50"] >= 0.9
