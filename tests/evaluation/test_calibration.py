"""Predictions of models, and what calibration makes of them."""

import numpy as np
import pytest
from PIL import Image
from small_models import small_model

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.sources import Split
from tnt_jax.evaluation.calibration import calibrate, calibrated, validation_split
from tnt_jax.evaluation.evaluate import predictions_of
from tnt_jax.storage.description import describe
from tnt_jax.tasks.task import Outputs


def model_of(task, names=("a", "b", "c"), **outputs):
    model = small_model(num_classes=len(names), in_channels=1)
    model.description = describe(model.config, class_names=names, outputs=Outputs(task, **outputs))
    return model


def source_of(targets, names=("a", "b", "c"), count=12):
    images = np.random.default_rng(3).integers(0, 256, (count, 32, 32, 1), np.uint8)
    return Split(images, targets, names)


def test_labels_and_thresholds_are_matched_by_name():
    model = model_of("multi_label", thresholds=(0.1, 0.2, 0.3))
    names, truth = ("c", "a"), np.zeros((12, 2), np.float32)
    data = DataConfig("any", task="multi_label")
    (predictions,) = predictions_of([model], source_of(truth, names), data)
    (whole,) = predictions_of([model], source_of(np.zeros((12, 3), np.float32)), data)
    np.testing.assert_allclose(predictions.scores, whole.scores[:, [2, 0]])
    np.testing.assert_allclose(predictions.thresholds, (0.3, 0.1))
    with pytest.raises(InputError, match="the model's task is multi_label, and any is read as single_label"):
        predictions_of([model], source_of(np.zeros(12, int)), DataConfig("any"))


@pytest.mark.slow
def test_a_calibrated_model_gives_logits_divided_by_the_temperature():
    model, labels = model_of("single_label"), np.arange(12) % 3
    (predictions,) = predictions_of([model], source_of(labels), DataConfig("any"))
    assert 0 < predictions.right(1).mean() < 1
    model.head.kernel[...] /= 20
    model.head.bias[...] /= 20
    labels = np.where(np.arange(12) < 9, predictions.top[:, 0], labels)
    found = calibrate(model, source_of(labels), DataConfig("any"))
    assert found.after["loss"] <= found.before["loss"]
    again = calibrated(model, found, {"split": "val"})
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(again(images)) * found.temperature, model(images), rtol=1e-4)
    assert again.description.source == {"temperature": found.temperature, "split": "val"}
    with pytest.raises(InputError, match="the model is a regression: it has no probabilities"):
        calibrate(model_of("regression"), source_of(labels), DataConfig("any"))


def test_a_split_without_a_mistake_is_refused():
    model = model_of("single_label")
    (predictions,) = predictions_of([model], source_of(np.arange(12) % 3), DataConfig("any"))
    with pytest.raises(InputError, match="all 12 images of any are predicted without a mistake: no temp"):
        calibrate(model, source_of(predictions.top[:, 0]), DataConfig("any"))


def test_a_temperature_at_its_bound_is_refused():
    model = model_of("multi_label")
    with pytest.raises(InputError, match=r"lies at the bound of temperatures, 20: "):
        calibrate(model, source_of(np.zeros((12, 3), np.float32)), DataConfig("any", task="multi_label"))


def test_what_is_trained_on_or_reported_is_not_calibrated_on(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / name / "1.png")
    data = DataConfig(f"folder:{tmp_path}")
    with pytest.raises(InputError, match=r"has images that the model was trained on \(split train\)"):
        validation_split(data, "train")
    with pytest.raises(InputError, match=r"has images that eval.py reports \(split val\)"):
        validation_split(data, "validation")
    (tmp_path / "test").symlink_to("train")
    assert len(validation_split(data, "validation")) == 2
