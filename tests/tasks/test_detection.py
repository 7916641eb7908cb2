"""Average precision beside pycocotools, suppression, and what is said of the boxes of images."""

import contextlib
import io

import jax.numpy as jnp
import numpy as np
import pytest

from tnt_jax.tasks.boxes import iou, suppressed
from tnt_jax.tasks.detection import MOST_BOXES, NAMES, BoxPredictions, Detection, coco_evaluation, coco_scores
from tnt_jax.tasks.task import Canvas, Outputs

CLASSES = 4


def random_boxes(rng, count, size):
    corner = rng.uniform(0, 0.8, (count, 2))
    return np.concatenate([corner, (corner + rng.uniform(0.02, 0.5, (count, 2))).clip(None, 1)], 1) * size


def random_images(seed, count=40):
    """Labels, and boxes that are found, some of them near right ones."""
    rng, labels, found = np.random.default_rng(seed), np.full((count, 1 + MOST_BOXES, 7), -1, np.float32), []
    for label in labels:
        size, many = rng.uniform(60, 400), rng.integers(0, 6)
        boxes = random_boxes(rng, many, 1.0)
        label[0, :4] = (0, 0, size, size)
        areas = ((boxes[:, 2:] - boxes[:, :2]) * size).prod(1)
        crowd = rng.random(many) < 0.1
        label[1 : 1 + many] = np.column_stack([boxes, rng.integers(0, CLASSES, many), crowd, areas])
        near = boxes + rng.normal(0, 0.02, boxes.shape)
        each = np.concatenate([near, random_boxes(rng, 3, 1.0)]) * size
        names = np.concatenate([label[1 : 1 + many, 4], rng.integers(0, CLASSES, 3)])
        found.append(np.column_stack([each, rng.uniform(0.05, 1, len(each)), names]).astype(np.float32))
    return labels, found


def of_pycocotools(labels, found):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results, annotations = COCO(), [], []
    for index, (label, boxes) in enumerate(zip(labels, found, strict=True), start=1):
        for *box, name, crowd, area in label[1:][label[1:, 4] >= 0]:
            left, top, right, bottom = np.array(box) * label[0, 2]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index, "category_id": int(name) + 1, "iscrowd": int(crowd)}
                | {"bbox": [float(left), float(top), float(right - left), float(bottom - top)], "area": float(area)}
            )
        for left, top, right, bottom, score, name in boxes.tolist():
            results.append(
                {"image_id": index, "category_id": int(name) + 1, "score": score}
                | {"bbox": [left, top, right - left, bottom - top]}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = {
            "images": [{"id": index + 1} for index in range(len(labels))],
            "annotations": annotations,
            "categories": [{"id": number + 1} for number in range(CLASSES)],
            "info": {},
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.slow  # pycocotools is not among what `make test` installs
@pytest.mark.parametrize("seed", range(3))
def test_the_twelve_are_pycocotools(seed):
    labels, found = random_images(seed)
    expected = of_pycocotools(labels, found)
    scores = coco_scores(coco_evaluation(found, labels, CLASSES))
    assert tuple(scores) == NAMES
    np.testing.assert_allclose(
        list(scores.values()), np.where(expected.stats < 0, np.nan, expected.stats), rtol=0, atol=1e-6
    )
    assert 0.1 < scores["ap"] < 0.9
    loss = np.zeros(len(labels))
    rows = BoxPredictions(found, labels, loss, 1.0, CLASSES).per_output(["a", "b", "c", "d"])
    of_classes = expected.eval["precision"][:, :, :, 0, -1].mean((0, 1))
    np.testing.assert_allclose([row["ap"] for row in rows], of_classes, atol=1e-6)
    assert sum(row["boxes"] for row in rows) == (labels[:, 1:, 4] >= 0).sum()


def test_nothing_found_is_no_precision_and_no_box_of_a_size_is_none():
    labels, found = random_images(0)
    scores = coco_scores(coco_evaluation([boxes[:0] for boxes in found], labels, CLASSES))
    assert scores["ap"] == scores["ar100"] == 0
    labels[:, 1:, 6] = np.where(labels[:, 1:, 4] >= 0, 100.0, -1)
    assert np.isnan(coco_scores(coco_evaluation(found, labels, CLASSES))["ap_large"])


def by_hand(boxes, classes):
    """Suppression as it is told: the best first, and what overlaps it by more than half and is of its class goes."""
    kept = []
    for index in range(len(boxes)):
        rivals = [other for other in kept if classes[other] == classes[index]]
        if all(float(iou(boxes[other], boxes[index])) <= 0.5 for other in rivals):
            kept.append(index)
    return [index not in kept for index in range(len(boxes))]


def test_suppression_leaves_the_best_of_each_class():
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, 12, 1.0).repeat(5, 0) + rng.normal(0, 0.02, (60, 4))
    boxes, classes = rng.permutation(boxes).astype(np.float32), rng.integers(0, 2, 60)
    gone = np.asarray(suppressed(jnp.asarray(boxes), jnp.asarray(classes)))
    assert gone.tolist() == by_hand(boxes, classes)
    assert 5 < gone.sum() < 55


def perfect(labels):
    """Logits of anchors that are the right boxes, and of some that are nothing."""
    boxes, classes = labels[:, 1:7, :4], labels[:, 1:7, 4].astype(int)
    anchors = np.where(classes[..., None] >= 0, boxes, [0, 0, 0.1, 0.1])
    scores = np.where(classes[..., None] == np.arange(CLASSES), 9.0, -9.0)
    return np.concatenate([scores, np.zeros_like(anchors), anchors], -1).astype(np.float32)


def without_crowds(seed):
    labels, _ = random_images(seed)
    labels[:, 1:, 5] = np.where(labels[:, 1:, 4] >= 0, 0, -1)
    return labels


def test_the_right_boxes_have_a_precision_of_one_and_no_loss_to_speak_of():
    task, labels = Detection(), without_crowds(1)
    found = task.evaluated(jnp.asarray(perfect(labels)), jnp.asarray(labels), np.ones(len(labels), bool))
    scores = task.scores([found], Outputs("detection"))
    assert scores["count"] == len(labels)
    assert scores["ap50"] > 0.97  # of two of one class that lie on each other one is suppressed
    assert scores["loss"] < 0.01


def test_mistakes_and_a_confusion_count_what_is_missed_and_what_is_not_there():
    labels = np.full((2, 1 + MOST_BOXES, 7), -1, np.float32)
    labels[:, 0, :4] = (0, 0, 100, 100)
    labels[0, 1] = (0.1, 0.1, 0.5, 0.5, 0, 0, 1600)
    labels[0, 2] = (0.6, 0.6, 0.9, 0.9, 1, 0, 900)
    found = [
        np.array([[10, 10, 50, 50, 0.9, 0], [0, 60, 20, 90, 0.8, 1], [60, 60, 90, 90, 0.2, 1]], np.float32),
        np.zeros((0, 6), np.float32),
    ]
    predictions = BoxPredictions(found, labels, np.zeros(2), 1.0, 2)
    assert predictions.rows(["a", "b"]) == [
        {"right": 1, "missed": 1, "wrong": 1},
        {"right": 0, "missed": 0, "wrong": 0},
    ]
    matrix = predictions.confusion(["a", "b"])
    assert matrix.counts.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert predictions.mistakes(["a", "b"], 5).images.tolist() == [0]


def test_boxes_of_windows_lie_in_the_image():
    task = Detection()
    canvas = Canvas((64, 64), 0, 16, 64, 32, (200, 100))  # a tall image in the middle of the window
    found = np.array([[0.5, 0.5, 0.75, 1.0, 0.9, 2], [0, 0, 0, 0, 0, 0]], np.float32)
    (box,) = task.join(iter([(0, 0, found)]), canvas)
    np.testing.assert_allclose(box[:4], [50, 100, 100, 200])
    twice = Canvas((64, 64), 0, 0, 64, 96, (64, 96))
    parts = [
        (0, 0, np.array([[0.5, 0, 1, 0.5, 0.9, 2]], np.float32)),
        (0, 32, np.array([[0, 0, 0.5, 0.5, 0.8, 2]], np.float32)),
    ]
    (box,) = task.join(iter(parts), twice)
    np.testing.assert_allclose(box[:5], [32, 0, 64, 32, 0.9], rtol=1e-6)
    result = task.result(np.array([box]), Outputs("detection"), ["a", "b", "c"])
    answer = task.answer(result, ["a", "b", "c"], 5)
    assert answer.fields["boxes"][0]["bbox"] == [32, 0, 32, 32]
    assert result["pred_classes"] == ["c"]
    assert set(task.pictures(result, np.zeros((64, 96, 3), np.uint8))) == {"_boxes.png"}
