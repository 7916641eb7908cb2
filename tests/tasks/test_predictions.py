"""Predictions of labels and numbers, how sure their metrics are, and what calibrates them."""

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import norm
from sklearn import metrics as theirs

from tnt_jax.tasks.calibration import best_threshold, fit_temperature
from tnt_jax.tasks.metrics import sigmoid_cross_entropy
from tnt_jax.tasks.multi_label import LabelPredictions
from tnt_jax.tasks.regression import ValuePredictions
from tnt_jax.tasks.single_label import ClassPredictions, softmax_cross_entropy

RNG = np.random.default_rng(0)
TRUTH = (RNG.random((200, 3)) < [0.5, 0.2, 0.05]).astype(np.float32)
SCORES = np.clip(0.5 * TRUTH + 0.6 * RNG.random((200, 3)), 0.01, 0.99)
LOGITS = logit(SCORES)
LABELS = LabelPredictions(TRUTH, LOGITS, np.zeros(200), np.array([0.5, 0.6, 0.5]), 10.0)


def test_labels_have_a_row_each_as_scikit_learn_has_it():
    rows = LABELS.per_output(("ant", "bee", "cat"))
    precision, recall, f1, count = theirs.precision_recall_fscore_support(TRUTH, LABELS.predicted)
    for label, row in enumerate(rows):
        assert (row["images"], row["threshold"]) == (count[label], LABELS.thresholds[label])
        assert row["precision"] == pytest.approx(precision[label], abs=1e-9)
        assert row["recall"] == pytest.approx(recall[label], abs=1e-9)
        assert row["f1"] == pytest.approx(f1[label], abs=1e-9)
        assert row["ap"] == pytest.approx(theirs.average_precision_score(TRUTH[:, label], SCORES[:, label]), abs=1e-9)
        assert row["recall_low"] < row["recall"] <= row["recall_high"]


def test_a_label_that_no_image_has_has_no_recall():
    row = LabelPredictions(TRUTH * [1, 1, 0], LOGITS, np.zeros(200), np.full(3, 2.0), 1.0).per_output("abc")[2]
    assert (row["images"], row["ap"], row["roc_auc"], row["recall"], row["precision"]) == (0, None, None, None, None)


def resampled(compute, count, seed):
    rng = np.random.default_rng(seed)
    return np.percentile([compute(rng.integers(0, count, count)) for _ in range(200)], (2.5, 97.5))


def class_intervals(labels, predictions):
    nothing = np.zeros(len(labels))
    return ClassPredictions(labels, predictions[:, None], nothing[:, None], nothing, 1.0).intervals()


def test_intervals_are_those_of_resampled_images_and_the_same_every_time():
    found = LABELS.intervals()
    plain = resampled(lambda rows: theirs.average_precision_score(TRUTH[rows], SCORES[rows], average="macro"), 200, 5)
    np.testing.assert_allclose(found["map"], plain, atol=0.03)
    f1 = resampled(lambda rows: theirs.f1_score(TRUTH[rows], LABELS.predicted[rows], average="macro"), 200, 6)
    np.testing.assert_allclose(found["macro_f1"], f1, atol=0.03)
    assert found == LABELS.intervals()
    labels, predictions = RNG.integers(0, 4, 300), RNG.integers(0, 4, 300)
    predictions = np.where(RNG.random(300) < 0.5, labels, predictions)
    found = class_intervals(labels, predictions)
    plain = resampled(lambda rows: theirs.balanced_accuracy_score(labels[rows], predictions[rows]), 300, 7)
    np.testing.assert_allclose(found["balanced_accuracy"], plain, atol=0.03)
    targets = RNG.normal(size=(200, 2))
    values = targets + RNG.normal(size=(200, 2))
    found = ValuePredictions(targets, values, np.zeros(200), 1.0).intervals()
    plain = resampled(lambda rows: theirs.r2_score(targets[rows], values[rows]), 200, 8)
    np.testing.assert_allclose(found["r2"], plain, atol=0.12)


def test_intervals_are_of_95_percent():
    """A mean of many errors is normally distributed; 90% would be a sixth narrower."""
    errors = RNG.exponential(size=(4000, 1))
    low, high = ValuePredictions(np.zeros((4000, 1)), errors, np.zeros(4000), 1.0).intervals()["mae"]
    expected = 2 * norm.ppf(0.975) * errors.std() / 4000**0.5
    assert high - low == pytest.approx(expected, rel=0.08)


def test_images_are_drawn_within_each_class():
    """A rare class that is never right stays so in every resample, and the interval lies around the value."""
    labels = np.repeat([0, 1, 2, 3], [30, 22, 6, 2])
    predictions = np.where(labels > 1, 0, labels)
    found = class_intervals(labels, predictions)
    assert found["balanced_accuracy"] == (0.5, 0.5)
    low, high = found["macro_f1"]
    assert low <= theirs.f1_score(labels, predictions, average="macro") <= high < 0.6


def test_saturated_probabilities_are_ranked_by_their_logits():
    truth, logits = np.array([[0], [1], [1], [0]]), np.array([[40.0], [50], [60], [45]])
    metrics = LabelPredictions(truth, logits, np.zeros(4), np.array([0.5]), 1.0).metrics()
    assert metrics["map"] == theirs.average_precision_score(truth, logits) == 1
    assert metrics["roc_auc"] == 1


def test_numbers_are_scored_in_their_units():
    targets = np.array([[1.0, 100], [2, 300], [3, 200]])
    predictions = ValuePredictions(
        targets, targets + np.array([[0.5, 0], [0, 30], [-0.5, 0]]), np.array([0.1, 0.2, 0.3]), 1.0
    )
    metrics = predictions.metrics()
    assert metrics["mae"] == pytest.approx((1 / 3 + 10) / 2)
    assert metrics["r2"] == pytest.approx(theirs.r2_score(targets, predictions.values))
    assert (metrics["images"], metrics["loss"]) == (3, pytest.approx(0.2))
    rows = predictions.per_output(("width", "weight"))
    assert [row["target"] for row in rows] == ["width", "weight"]
    assert rows[1]["rmse"] == pytest.approx(np.sqrt(300))


def test_two_classes_have_an_area_under_the_roc_curve():
    labels, second = RNG.integers(0, 2, 100), RNG.random(100)
    top = np.stack([second > 0.5, second <= 0.5], axis=1).astype(int)
    scores = np.stack([np.maximum(second, 1 - second), np.minimum(second, 1 - second)], axis=1)
    predictions = ClassPredictions(labels, top, scores, np.zeros(100), 1.0)
    assert predictions.metrics()["roc_auc"] == pytest.approx(theirs.roc_auc_score(labels, second))


def test_a_temperature_undoes_what_logits_were_multiplied_by():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(4000, 3)) * 2
    odds = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    labels = np.array([rng.choice(3, p=row) for row in odds])
    assert fit_temperature(3 * logits, labels, softmax_cross_entropy) == pytest.approx(3, rel=0.1)
    many = (rng.random((4000, 3)) < 1 / (1 + np.exp(-logits))).astype(float)
    assert fit_temperature(logits / 2, many, sigmoid_cross_entropy) == pytest.approx(0.5, rel=0.1)


def test_a_threshold_is_that_of_the_highest_f1():
    truth, scores = TRUTH[:, 1] > 0.5, SCORES[:, 1]
    ours = theirs.f1_score(truth, scores >= best_threshold(truth, scores))
    assert ours == pytest.approx(max(theirs.f1_score(truth, scores >= cut) for cut in scores))
    assert best_threshold(np.array([True, False]), np.array([0.8, 0.4])) == pytest.approx(0.6)
    assert best_threshold(np.zeros(5, bool), np.arange(5.0)) == 0.5
    assert best_threshold(np.ones(3, bool), np.full(3, 0.4)) < 0.4
