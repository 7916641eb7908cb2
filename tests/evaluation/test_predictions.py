"""Predictions of labels and numbers, how sure their metrics are, and what calibration makes of them."""

import numpy as np
import pytest
from PIL import Image
from scipy.special import logit
from scipy.stats import norm
from sklearn import metrics as theirs
from small_models import small_model

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.sources import Split
from tnt_jax.evaluation.calibration import best_threshold, calibrate, calibrated, fit_temperature, validation_split
from tnt_jax.evaluation.evaluate import predictions_of
from tnt_jax.evaluation.predictions import LabelPredictions, ValuePredictions, metrics_of, per_output
from tnt_jax.evaluation.scores import Predictions
from tnt_jax.storage.description import Outputs, describe
from tnt_jax.tasks.bootstrap import class_intervals, label_intervals, value_intervals

RNG = np.random.default_rng(0)
TRUTH = (RNG.random((200, 3)) < [0.5, 0.2, 0.05]).astype(np.float32)
SCORES = np.clip(0.5 * TRUTH + 0.6 * RNG.random((200, 3)), 0.01, 0.99)
LOGITS = logit(SCORES)
LABELS = LabelPredictions(TRUTH, LOGITS, np.zeros(200), np.array([0.5, 0.6, 0.5]), 10.0)


def test_labels_have_a_row_each_as_scikit_learn_has_it():
    rows = per_output(LABELS, ("ant", "bee", "cat"))
    precision, recall, f1, count = theirs.precision_recall_fscore_support(TRUTH, LABELS.predicted)
    for label, row in enumerate(rows):
        assert (row["images"], row["threshold"]) == (count[label], LABELS.thresholds[label])
        assert row["precision"] == pytest.approx(precision[label], abs=1e-9)
        assert row["recall"] == pytest.approx(recall[label], abs=1e-9)
        assert row["f1"] == pytest.approx(f1[label], abs=1e-9)
        assert row["ap"] == pytest.approx(theirs.average_precision_score(TRUTH[:, label], SCORES[:, label]), abs=1e-9)
        assert row["recall_low"] < row["recall"] <= row["recall_high"]


def test_a_label_that_no_image_has_has_no_recall():
    row = per_output(LabelPredictions(TRUTH * [1, 1, 0], LOGITS, np.zeros(200), np.full(3, 2.0), 1.0), "abc")[2]
    assert (row["images"], row["ap"], row["roc_auc"], row["recall"], row["precision"]) == (0, None, None, None, None)


def resampled(compute, count, seed):
    rng = np.random.default_rng(seed)
    return np.percentile([compute(rng.integers(0, count, count)) for _ in range(200)], (2.5, 97.5))


def test_intervals_are_those_of_resampled_images_and_the_same_every_time():
    found = label_intervals(TRUTH, LOGITS, LABELS.predicted)
    plain = resampled(lambda rows: theirs.average_precision_score(TRUTH[rows], SCORES[rows], average="macro"), 200, 5)
    np.testing.assert_allclose(found["map"], plain, atol=0.03)
    f1 = resampled(lambda rows: theirs.f1_score(TRUTH[rows], LABELS.predicted[rows], average="macro"), 200, 6)
    np.testing.assert_allclose(found["macro_f1"], f1, atol=0.03)
    assert found == label_intervals(TRUTH, LOGITS, LABELS.predicted)
    labels, predictions = RNG.integers(0, 4, 300), RNG.integers(0, 4, 300)
    predictions = np.where(RNG.random(300) < 0.5, labels, predictions)
    found = class_intervals(labels, predictions, 4)
    plain = resampled(lambda rows: theirs.balanced_accuracy_score(labels[rows], predictions[rows]), 300, 7)
    np.testing.assert_allclose(found["balanced_accuracy"], plain, atol=0.03)
    targets = RNG.normal(size=(200, 2))
    values = targets + RNG.normal(size=(200, 2))
    found = value_intervals(targets, values, mean=True)
    plain = resampled(lambda rows: theirs.r2_score(targets[rows], values[rows]), 200, 8)
    np.testing.assert_allclose(found["r2"], plain, atol=0.12)


def test_intervals_are_of_95_percent():
    """A mean of many errors is normally distributed; 90% would be a sixth narrower."""
    errors = RNG.exponential(size=(4000, 1))
    low, high = value_intervals(np.zeros((4000, 1)), errors, mean=True)["mae"]
    expected = 2 * norm.ppf(0.975) * errors.std() / 4000**0.5
    assert high - low == pytest.approx(expected, rel=0.08)


def test_images_are_drawn_within_each_class():
    """A rare class that is never right stays so in every resample, and the interval lies around the value."""
    labels = np.repeat([0, 1, 2, 3], [30, 22, 6, 2])
    predictions = np.where(labels > 1, 0, labels)
    found = class_intervals(labels, predictions, 4)
    assert found["balanced_accuracy"] == (0.5, 0.5)
    low, high = found["macro_f1"]
    assert low <= theirs.f1_score(labels, predictions, average="macro") <= high < 0.6


def test_saturated_probabilities_are_ranked_by_their_logits():
    truth, logits = np.array([[0], [1], [1], [0]]), np.array([[40.0], [50], [60], [45]])
    metrics = metrics_of(LabelPredictions(truth, logits, np.zeros(4), np.array([0.5]), 1.0))
    assert metrics["map"] == theirs.average_precision_score(truth, logits) == 1
    assert metrics["roc_auc"] == 1


def test_numbers_are_scored_in_their_units():
    targets = np.array([[1.0, 100], [2, 300], [3, 200]])
    predictions = ValuePredictions(
        targets, targets + np.array([[0.5, 0], [0, 30], [-0.5, 0]]), np.array([0.1, 0.2, 0.3]), 1.0
    )
    metrics = metrics_of(predictions)
    assert metrics["mae"] == pytest.approx((1 / 3 + 10) / 2)
    assert metrics["r2"] == pytest.approx(theirs.r2_score(targets, predictions.values))
    assert (metrics["images"], metrics["loss"]) == (3, pytest.approx(0.2))
    rows = per_output(predictions, ("width", "weight"))
    assert [row["target"] for row in rows] == ["width", "weight"]
    assert rows[1]["rmse"] == pytest.approx(np.sqrt(300))


def test_two_classes_have_an_area_under_the_roc_curve():
    labels, second = RNG.integers(0, 2, 100), RNG.random(100)
    top = np.stack([second > 0.5, second <= 0.5], axis=1).astype(int)
    scores = np.stack([np.maximum(second, 1 - second), np.minimum(second, 1 - second)], axis=1)
    predictions = Predictions(labels, top, scores, np.zeros(100), 1.0)
    assert metrics_of(predictions)["roc_auc"] == pytest.approx(theirs.roc_auc_score(labels, second))


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


def test_a_temperature_undoes_what_logits_were_multiplied_by():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(4000, 3)) * 2
    odds = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    labels = np.array([rng.choice(3, p=row) for row in odds])
    assert fit_temperature(3 * logits, labels, "single_label") == pytest.approx(3, rel=0.1)
    many = (rng.random((4000, 3)) < 1 / (1 + np.exp(-logits))).astype(float)
    assert fit_temperature(logits / 2, many, "multi_label") == pytest.approx(0.5, rel=0.1)


def test_a_threshold_is_that_of_the_highest_f1():
    truth, scores = TRUTH[:, 1] > 0.5, SCORES[:, 1]
    ours = theirs.f1_score(truth, scores >= best_threshold(truth, scores))
    assert ours == pytest.approx(max(theirs.f1_score(truth, scores >= cut) for cut in scores))
    assert best_threshold(np.zeros(5, bool), np.arange(5.0)) == 0.5
    assert best_threshold(np.ones(3, bool), np.full(3, 0.4)) < 0.4


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
