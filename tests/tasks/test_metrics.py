"""Metrics are those of scikit-learn."""

import warnings

import numpy as np
import pytest
from scipy.special import logit
from sklearn import metrics as theirs

from tnt_jax.tasks.metrics import computed, mean_of_defined, ranking
from tnt_jax.tasks.multi_label import label_metrics
from tnt_jax.tasks.regression import METRICS as OF_NUMBERS
from tnt_jax.tasks.regression import errors_of
from tnt_jax.tasks.single_label import METRICS as OF_CLASSES
from tnt_jax.tasks.single_label import count_right
from tnt_jax.tasks.table import metric_of

CLOSE = {"rel": 1e-9, "abs": 1e-12}


@pytest.mark.parametrize("classes", [2, 7])
def test_class_metrics_are_scikit_learns(classes):
    rng = np.random.default_rng(classes)
    labels = rng.choice(classes, 300, p=rng.dirichlet(np.ones(classes)))
    predictions = np.where(rng.random(300) < 0.6, labels, rng.integers(0, classes, 300))
    labels[labels == classes - 1] = 0  # one that is predicted and that no image has
    ours = computed(OF_CLASSES, count_right(labels, predictions, classes + 2))  # and two that nobody has heard of
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.precision_recall_fscore_support(labels, predictions, average="macro", zero_division=0)
        assert ours["balanced_accuracy"] == pytest.approx(theirs.balanced_accuracy_score(labels, predictions), **CLOSE)
    for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        assert ours[f"macro_{name}"] == pytest.approx(value, **CLOSE)


@pytest.mark.parametrize("digits", [1, 9])  # with many equal scores, and with none
def test_average_precision_and_roc_are_scikit_learns_with_and_without_weights(digits):
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    scores = np.round(rng.random(200) * 0.6 + 0.4 * truth, digits)
    weights = rng.integers(0, 4, (3, 200)).astype(float)
    precision, area = ranking(truth, scores)
    assert precision[0] == pytest.approx(theirs.average_precision_score(truth, scores), **CLOSE)
    assert area[0] == pytest.approx(theirs.roc_auc_score(truth, scores), **CLOSE)
    for row, *ours in zip(weights, *ranking(truth, scores, weights), strict=True):
        chosen = {"sample_weight": row}
        assert ours[0] == pytest.approx(theirs.average_precision_score(truth, scores, **chosen), **CLOSE)
        assert ours[1] == pytest.approx(theirs.roc_auc_score(truth, scores, **chosen), **CLOSE)


def test_a_label_that_all_images_or_none_have_has_no_ranking():
    assert np.isnan(ranking(np.zeros(3, bool), np.arange(3.0))[0])
    assert np.isnan(ranking(np.ones(3, bool), np.arange(3.0))[1])


def test_multi_label_metrics_are_scikit_learns():
    rng = np.random.default_rng(1)
    labels = (rng.random((150, 5)) < [0.5, 0.1, 0.3, 0.7, 0.02]).astype(np.float32)
    scores = 0.7 * rng.random((150, 5)) + 0.3 * labels
    thresholds = np.array([0.5, 0.3, 0.6, 0.5, 0.99])
    ours, predicted = label_metrics(labels, logit(scores), thresholds), scores >= thresholds
    assert ours["map"] == pytest.approx(theirs.average_precision_score(labels, scores, average="macro"), **CLOSE)
    assert ours["roc_auc"] == pytest.approx(theirs.roc_auc_score(labels, scores, average="macro"), **CLOSE)
    for average in ("macro", "micro"):
        f1 = theirs.f1_score(labels, predicted, average=average, zero_division=0)
        assert ours[f"{average}_f1"] == pytest.approx(f1, **CLOSE)
    recall = theirs.recall_score(labels, predicted, average="macro", zero_division=0)
    precision = theirs.precision_score(labels, predicted, average="macro", zero_division=0)
    assert (ours["macro_recall"], ours["macro_precision"]) == pytest.approx((recall, precision), **CLOSE)
    assert ours["exact_match"] == pytest.approx(theirs.accuracy_score(labels, predicted), **CLOSE)


def test_regression_metrics_are_scikit_learns_with_and_without_weights():
    rng = np.random.default_rng(2)
    targets = rng.normal(size=(100, 3)) * [1, 50, 1e-3] + [1e5, 0, 0]
    values = targets + rng.normal(size=(100, 3)) * [0.3, 30, 1e-4]
    weights = rng.integers(0, 4, (2, 100)).astype(float)
    for row, ours in ((None, errors_of(targets, values)), (0, errors_of(targets, values, weights))):
        chosen = {"multioutput": "raw_values", "sample_weight": None if row is None else weights[row]}
        expected = {
            "r2": theirs.r2_score(targets, values, **chosen),
            "rmse": theirs.root_mean_squared_error(targets, values, **chosen),
            "mae": theirs.mean_absolute_error(targets, values, **chosen),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(computed(OF_NUMBERS, ours)[name][0], value, rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 / 3])
def test_r2_of_one_value_is_undefined_and_no_metric_else(value):
    targets = np.column_stack([np.full(7, value), np.arange(7.0)])
    ours = computed(OF_NUMBERS, errors_of(targets, targets + 0.5, np.stack([np.ones(7), np.arange(7.0)])))
    assert np.isnan(ours["r2"][:, 0]).all()
    assert np.isfinite(ours["r2"][:, 1]).all()
    assert np.isfinite(ours["rmse"]).all()
    assert (mean_of_defined(ours["r2"][0]), mean_of_defined(ours["r2"][:, 0])) == (
        ours["r2"][0, 1],
        pytest.approx(np.nan, nan_ok=True),
    )
    assert (metric_of("r2").text(np.nan), metric_of("map").text(None), metric_of("map").text(0.5)) == (
        "-",
        "-",
        "50.00%",
    )


def test_rankings_are_undefined_where_no_label_has_both_kinds_of_images():
    ours = label_metrics(np.ones((4, 2)), np.full((4, 2), 0.7))
    assert np.isnan([ours["map"], ours["roc_auc"]]).all()
    assert ours["macro_f1"] == 1
