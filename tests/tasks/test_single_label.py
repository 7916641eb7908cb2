import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support

from tnt_jax.tasks.calibration import calibration_error
from tnt_jax.tasks.metrics import wilson
from tnt_jax.tasks.single_label import ClassPredictions

ANSWERS = ClassPredictions(
    labels=np.array([0, 0, 1, 1]),
    top=np.array([[0, 1], [1, 2], [1, 0], [1, 2]]),
    scores=np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3]]),
    loss=np.array([0.1, 2.0, 0.2, 0.3]),
    images_per_second=10.0,
)


@pytest.mark.parametrize(("right", "count"), [(0, 7), (0, 21), (7, 7), (81, 100), (40753, 50000)])
def test_the_interval_is_wilsons_as_scipy_has_it(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    found = wilson(right, count)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert 0 <= found[0] <= found[1] <= 1


def test_calibration_error_is_the_mean_gap_of_confidence_and_accuracy():
    # Two bins: three predictions at 0.95 of which two are right, one at 0.3 that is right.
    confidence, right = np.array([0.95, 0.95, 0.95, 0.3]), np.array([True, True, False, True])
    assert calibration_error(confidence, right) == pytest.approx((3 * abs(2 / 3 - 0.95) + 0.7) / 4)
    # Of 15 bins the borders are 0.6, 0.667 and 0.733, so that these lie in two; of 10 they would lie in one.
    apart = calibration_error(np.array([0.68, 0.62]), np.array([True, False]))
    assert apart == pytest.approx((0.32 + 0.62) / 2)
    # The ends of the bins: 0 and 1 belong to the first and the last.
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_the_summary_counts_every_image_once():
    scores = ANSWERS.metrics()
    assert (scores["images"], scores["top1"], scores["top5"]) == (4, 0.75, 0.75)
    assert (scores["top1_low"], scores["top1_high"]) == wilson(3, 4)
    assert scores["loss"] == pytest.approx(0.65)
    assert scores["ece"] == pytest.approx((abs(1 - 0.9) + 0.6 + abs(1 - 0.8) + abs(1 - 0.7)) / 4)


def test_classes_have_recall_and_precision():
    ant, bee = ANSWERS.per_output(("ant", "bee", "cat"))
    assert (ant["class"], ant["images"], ant["recall"], ant["precision"]) == ("ant", 2, 0.5, 1.0)
    assert (bee["recall"], bee["precision"]) == (1.0, pytest.approx(2 / 3))
    precision, recall, f1, _ = precision_recall_fscore_support(ANSWERS.labels, ANSWERS.top[:, 0])
    for row, *expected in zip((ant, bee), precision, recall, f1, strict=True):
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(expected)
    np.testing.assert_array_equal(ANSWERS.confusion("abc").counts, [[1, 1, 0], [0, 2, 0], [0, 0, 0]])


def test_several_right_answers_count_and_images_without_any_are_left_out():
    judged = ANSWERS.rescored([frozenset({5}), frozenset({1, 7}), frozenset(), frozenset({2})])
    assert judged.right(1).tolist() == [False, True, False]
    assert judged.right(5).tolist() == [False, True, True]
    assert np.isnan(judged.loss).all()
