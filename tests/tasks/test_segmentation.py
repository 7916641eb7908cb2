"""Metrics of masks are scikit-learn's, over all pixels together; intervals are over images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score, precision_score, recall_score

from tnt_jax.config import InputError
from tnt_jax.tasks.segmentation import IGNORED, Segmentation, coloured, palette
from tnt_jax.tasks.task import Canvas, Outputs

CLASSES, NAMES = 6, tuple("abcdef")
TASK = Segmentation()


def case(images=9, certain=2.0):
    """Logits and masks; class 4 is nowhere, and no mask has class 3, which is predicted."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 0, 0, 1, 2, 5], (images, 8, 10)).astype(np.uint16)
    logits = rng.normal(size=(images, 8, 10, CLASSES)) + certain * np.eye(CLASSES)[labels]
    logits[..., 4] = -50
    labels[:, :2], labels[1] = IGNORED, IGNORED
    return logits.astype(np.float32), labels


def flat(logits, labels):
    seen = labels != IGNORED
    return labels[seen], logits.argmax(-1)[seen]


def predicted(logits, labels, asked=None):
    asked = np.ones(CLASSES, bool) if asked is None else asked
    arrays = [np.asarray(each) for each in TASK.of_each_image(jnp.asarray(logits), jnp.asarray(labels), asked)]
    return TASK.predictions(arrays, Outputs("segmentation"), None, 1.0)


def test_the_scores_of_a_run_are_scikit_learns_whatever_fills_the_last_batch():
    logits, labels = case()
    batches = []
    for at in (0, 5):
        part = [np.resize(each[at : at + 5], (5, *each.shape[1:])) for each in (logits, labels)]
        mask = np.arange(at, at + 5) < len(logits)
        batches.append(jax.device_get(TASK.evaluated(*map(jnp.asarray, part), jnp.asarray(mask))))
    scores = TASK.scores(batches, Outputs("segmentation"))
    true, found = flat(logits, labels)
    assert scores["count"] == 9
    assert scores["miou"] == pytest.approx(jaccard_score(true, found, average="macro"), rel=1e-9)
    assert scores["pixel_accuracy"] == pytest.approx((true == found).mean(), rel=1e-9)
    assert scores.keys() == {"count", "miou", "pixel_accuracy", "loss"}
    logits[3, 0, 0, 0] = np.nan
    found = TASK.evaluated(*map(jnp.asarray, (logits, labels, np.ones(9, bool))))
    broken = TASK.scores([jax.device_get(found)], Outputs())
    assert np.isnan(broken["loss"])


def test_each_class_and_the_confusion_are_scikit_learns():
    logits, labels = case()
    predictions, (true, found) = predicted(logits, labels), flat(logits, labels)
    assert predictions.metrics()["miou"] == pytest.approx(jaccard_score(true, found, average="macro"), rel=1e-9)
    matrix = predictions.confusion(NAMES)
    np.testing.assert_array_equal(matrix.counts, confusion_matrix(true, found, labels=range(CLASSES)))
    assert matrix.of == "pixels"
    rows = {row["class"]: row for row in predictions.per_output(NAMES)}
    assert list(rows) == ["a", "b", "c", "d", "f"]
    options = {"average": None, "labels": range(CLASSES), "zero_division": 0}
    for name, function in (("iou", jaccard_score), ("recall", recall_score), ("precision", precision_score)):
        wanted = dict(zip(NAMES, function(true, found, **options), strict=True))
        assert {key: row[name] for key, row in rows.items()} == pytest.approx({key: wanted[key] for key in rows})
    assert rows["d"]["images"] == 0 < rows["a"]["images"] == 8
    for row in rows.values():
        assert row["iou_low"] <= row["iou"] <= row["iou_high"]
    assert [row["pixel_accuracy"] for row in predictions.rows(NAMES)][2] == pytest.approx(
        (labels[2] == logits[2].argmax(-1))[2:].mean()
    )


def test_intervals_are_over_images_and_narrow_with_them():
    widths = []
    for images in (10, 160):
        found = predicted(*case(images)).metrics()
        assert found["miou_low"] < found["miou"] < found["miou_high"]
        widths.append(found["miou_high"] - found["miou_low"])
    assert 2 < widths[0] / widths[1] < 8  # four, as the root of 16
    logits, labels = case()
    alike = predicted(np.repeat(logits[:1], 12, 0), np.repeat(labels[:1], 12, 0)).metrics()
    assert alike["miou_low"] == pytest.approx(alike["miou_high"])


def test_only_classes_that_are_asked_for_are_predicted():
    logits, labels = case()
    asked = np.array([True, True, True, False, True, True])
    found = predicted(logits, labels, asked)
    assert not found.confusions[:, :, 3].any()


def test_mistakes_are_the_images_of_the_lowest_miou_with_their_masks():
    logits, labels = case()
    logits[4] *= -1
    predictions = predicted(logits, labels)
    shown = predictions.mistakes(NAMES, 2)
    assert shown.images[0] == 4
    assert shown.captions[0].startswith("mIoU 0%\n")
    np.testing.assert_array_equal(shown.pictures[0][:, :10], coloured(labels[4]))
    np.testing.assert_array_equal(shown.pictures[0][:, 10:], coloured(logits[4].argmax(-1).astype(np.uint16)))
    right, labels = case(certain=100.0)
    with pytest.raises(InputError, match="there are no mistakes: all 9 predictions are right"):
        predicted(right, labels).mistakes(NAMES, 2)


def test_mirror_images_are_mirrored_back():
    logits, _ = case()
    np.testing.assert_array_equal(TASK.mirrored(logits[:, :, ::-1]), logits)


def test_windows_are_averaged_and_brought_to_the_size_of_the_image():
    left, right = np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3), np.float32)
    left[..., 1], right[..., 2] = 0.6, 1.0
    joined = TASK.join([(0, 0, left), (0, 2, right)], Canvas((4, 4), 0, 0, 4, 6, (4, 6)))
    np.testing.assert_array_equal(joined, [[1, 1, 2, 2, 2, 2]] * 4)
    assert TASK.join([(0, 0, left)], Canvas((4, 4), 0, 0, 4, 4, (9, 7))).shape == (9, 7)
    # Where two windows meet, the mean counts beside what one alone has seen: 0.55 and 0.45 of the two classes.
    one, two = np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3), np.float32)
    one[:, :2, 1], one[:, 2:], two[...] = 1.0, (0, 0.4, 0.6), (0, 0.4, 0.6)
    wide = TASK.join([(0, 0, one), (0, 2, two)], Canvas((4, 4), 0, 0, 4, 6, (4, 12)))
    np.testing.assert_array_equal(wide[0], [1] * 5 + [2] * 7)
    # A low image in the middle of its window.
    left[1:3, :, 2] = 0.9
    np.testing.assert_array_equal(TASK.join([(0, 0, left)], Canvas((4, 4), 1, 0, 2, 4, (2, 4))), [[2] * 4] * 2)


def test_a_mask_of_many_classes_has_16_bits():
    image = np.zeros((2, 3, 3), np.uint8)
    for most, mode in ((254, "P"), (255, "I;16"), (900, "I;16")):
        mask = np.array([[0, 1, 2], [3, 4, most]], np.uint16)
        pictures = TASK.pictures({"pred_mask": mask}, image)
        assert pictures[".png"].mode == mode
        np.testing.assert_array_equal(np.asarray(pictures[".png"]), mask)
        assert pictures["_overlay.png"].size == (3, 2)


def test_the_palette_is_that_of_pascal_voc():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 7: (128, 128, 128), 12: (64, 0, 128), 20: (0, 64, 128)}
    assert {index: tuple(palette(21)[index].tolist()) for index in known} == known
