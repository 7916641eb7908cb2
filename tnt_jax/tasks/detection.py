"""The boxes of an image and their classes: COCO's average precision.

A label is float32 (1 + `MOST_BOXES`, 7). A row is left, top, right, bottom as shares of the prepared image, the class,
whether it is a crowd, and the area in pixels of the whole image; -1 where there is none. The first row is the prepared
image itself, in pixels of the whole one.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from tnt_jax.errors import InputError
from tnt_jax.tasks import task
from tnt_jax.tasks.boxes import corners, decode, iou, suppressed
from tnt_jax.tasks.metrics import LOSS, Metric, proportion
from tnt_jax.tasks.segmentation import palette
from tnt_jax.tasks.task import Answer, Canvas, Matrix, Mistakes, Outputs, Predictions, class_name, short

if TYPE_CHECKING:
    import jax

MOST_BOXES = 100
MOST_FOUND = 100
"""Boxes that are kept of an image, as COCO counts them."""
CANDIDATES, LEAST_SCORE = 1000, 0.05
"""Boxes of anchors that `suppressed` looks at, and the score that they need."""
SHOWN_SCORE = 0.5
"""From which on a box is drawn, or counts in a confusion."""
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium")
NAMES += ("ar_large",)
"""COCO's twelve, in its order."""
TITLES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ar1": "AR1", "ar10": "AR10", "ar100": "AR100"}


def _metric(name: str) -> Metric:
    return proportion(name, lambda _: np.nan, TITLES.get(name, ""))


METRICS = (*map(_metric, NAMES), LOSS)


def coco_evaluation(found: Sequence[np.ndarray], labels: Sequence[np.ndarray], classes: int) -> Any:
    """The evaluation of faster-coco-eval, accumulated, of boxes in pixels of whole images.

    Args:
        found: of each image (count, 6): left, top, right, bottom, score, class.
        labels: of each image its label.
    """
    evaluator, COCO = _faster_coco_eval()
    annotations, images, results = [], [], []
    for index, (boxes, label) in enumerate(zip(found, labels, strict=True), start=1):
        images.append({"id": index, "width": 1, "height": 1})
        for *box, name, crowd, size in in_pixels(label):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index, "category_id": int(name) + 1, "bbox": _xywh(box)}
                | {"iscrowd": int(crowd), "area": float(size), "ignore": int(crowd)}
            )
        for *box, score, name in boxes:
            results.append({"image_id": index, "category_id": int(name) + 1, "bbox": _xywh(box), "score": float(score)})
    categories = [{"id": number + 1, "name": str(number)} for number in range(classes)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO({"images": images, "annotations": annotations, "categories": categories, "info": {}})
        evaluation = evaluator(truth, truth.loadRes(results) if results else COCO(_none_of(truth)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _none_of(truth: Any) -> dict:
    return truth.dataset | {"annotations": []}


def _faster_coco_eval() -> tuple:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise InputError(
            "average precision is computed by faster-coco-eval, which is not installed: pip install tnt-jax[coco]"
        ) from None
    return COCOeval_faster, COCO


def _xywh(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]


def in_pixels(label: Float[np.ndarray, "rows 7"]) -> Float[np.ndarray, "boxes 7"]:
    """The boxes of a label in pixels of the whole image."""
    rows = label[1:][label[1:, 4] >= 0].copy()
    rows[:, :4] = _to_pixels(rows[:, :4], label)
    return rows


def _to_pixels(boxes: np.ndarray, label: np.ndarray) -> np.ndarray:
    low, high = np.tile(label[0, :2], 2), np.tile(label[0, 2:4], 2)
    return low + boxes * (high - low)


def coco_scores(evaluation: Any) -> dict[str, float]:
    """COCO's twelve; NaN where no box is of such a size."""
    values = map(float, evaluation.stats[:12])
    return {name: np.nan if value < 0 else value for name, value in zip(NAMES, values, strict=True)}


@dataclasses.dataclass(frozen=True)
class BoxPredictions(Predictions):
    """A model's boxes for a number of images."""

    found: list[Float[np.ndarray, "boxes 6"]]
    """In pixels of the whole image, and score and class."""
    labels: Float[np.ndarray, "images rows 7"]
    loss: Float[np.ndarray, " images"]
    images_per_second: float
    classes: int

    def metrics(self) -> dict[str, float]:
        found = coco_scores(coco_evaluation(self.found, self.labels, self.classes))
        return {"images": len(self.loss)} | found | self._loss_and_rate()

    def per_output(self, names: Sequence[str]) -> list[dict]:
        """For each class that images have: their number, its boxes, AP and AP50."""
        precision = coco_evaluation(self.found, self.labels, self.classes).eval["precision"]
        rows, there = [], self.labels[:, 1:, 4]
        for label in range(self.classes):
            of_class = np.where(precision[:, :, label, 0, -1] > -1, precision[:, :, label, 0, -1], np.nan)
            if (there == label).any() and not np.isnan(of_class).all():
                images, boxes = int((there == label).any(1).sum()), int((there == label).sum())
                ap, ap50 = float(np.nanmean(of_class)), float(np.nanmean(of_class[0]))
                rows.append({"class": names[label], "images": images, "boxes": boxes, "ap": ap, "ap50": ap50})
        return rows

    def rows(self, names: Sequence[str]) -> list[dict]:
        return [
            dict(zip(("right", "missed", "wrong"), self._counts(image), strict=True)) for image in range(len(self.loss))
        ]

    def confusion(self, names: Sequence[str]) -> Matrix:
        """Rows are the right classes, columns the predicted ones; the last of each is nothing."""
        counts = np.zeros((self.classes + 1,) * 2, np.int64)
        for image in range(len(self.loss)):
            for label, value in self._pairs(image):
                counts[label, value] += 1
        names = [*names, "nothing"]
        title = f"{len(self.loss):,} images, boxes of a score of at least {SHOWN_SCORE:g} that overlap by half"
        return Matrix(counts, counts.sum(axis=1), names, names, title, "boxes")

    def mistakes(self, names: Sequence[str], count: int) -> Mistakes:
        """The images with the most boxes that are missed or wrong."""
        each = np.array([self._counts(image) for image in range(len(self.loss))])
        errors = each[:, 1] + each[:, 2]
        worst = np.argsort(-errors, kind="stable")[: min(count, int((errors > 0).sum()))]
        if not len(worst):
            raise task.no_mistakes(len(errors))
        captions = [f"{each[index, 0]} right\n{each[index, 1]} missed, {each[index, 2]} wrong" for index in worst]
        return Mistakes(worst, captions, f"{len(errors):,} images; those with the most boxes missed or wrong")

    def _pairs(self, image: int) -> list[tuple[int, int]]:
        """Of each box its class and that of what was found in its place; `classes` stands for nothing."""
        boxes = in_pixels(self.labels[image])
        boxes = boxes[boxes[:, 5] == 0]
        found = self.found[image][self.found[image][:, 4] >= SHOWN_SCORE]
        free, pairs = np.ones(len(boxes), bool), []
        overlaps = iou(found[:, None, :4], boxes[None, :, :4])
        for index in np.argsort(-found[:, 4], kind="stable"):
            best = np.where(free, overlaps[index], -1).argmax() if len(boxes) else 0
            hit = len(boxes) and free[best] and overlaps[index, best] >= 0.5
            free[best : best + 1] &= not hit
            pairs.append((int(boxes[best, 4]) if hit else self.classes, int(found[index, 5])))
        return pairs + [(int(box[4]), self.classes) for box in boxes[free]]

    def _counts(self, image: int) -> tuple[int, int, int]:
        """Boxes that are right, missed, and wrong."""
        pairs = self._pairs(image)
        right, missed = sum(label == value for label, value in pairs), sum(value == self.classes for _, value in pairs)
        return right, missed, len(pairs) - right - missed


class Detection(task.DenseTask):
    """Labels are float32 (images, rows, 7), and come with their image."""

    name = "detection"
    noun = "classes"
    told = "boxes"
    heads = ("retinanet", "detr", "detr_unpooled")
    metrics = METRICS
    losses = ("detection", "detection_giou")
    weighs_classes = False
    needs = "boxes of each image"
    sources = "coco:PATH, voc:PATH or boxes:PATH"
    wanted = "a class of each box"
    pipeline = tag = "object-detection"

    def losses_of(self, head: str) -> tuple[str, ...]:
        return self.losses if head == "retinanet" else self.losses[:1]

    def label_shape(self, outputs: int, image_size: tuple[int, int]) -> tuple[int, ...]:
        return (1 + MOST_BOXES, 7)

    def check_labels(self, labels: np.ndarray, names: Sequence[str], split: str) -> None:
        """Boxes are checked where they are read. Raises InputError where nothing can score them."""
        _faster_coco_eval()

    def moved(self, label: Float[np.ndarray, "boxes 7"], places: Any) -> Float[np.ndarray, "rows 7"]:
        """The part of each box that lies in the prepared image; one of which nothing is left goes."""
        row = np.full((1 + MOST_BOXES, 7), -1, np.float32)
        row[0, :4], boxes = places.of_boxes(label[:, :4])
        inside = (boxes[:, 2:] - boxes[:, :2] > 1e-6).all(axis=1)
        left = np.concatenate([boxes, label[:, 4:]], axis=1)[inside]
        left = left[np.argsort(left[:, 5], kind="stable")]  # crowds last: the first rows are those that teach
        if len(left) > MOST_BOXES:
            raise InputError(
                f"an image has {len(left)} boxes, and at most {MOST_BOXES} are taken of one: cut it into smaller ones"
            )
        row[1 : 1 + len(left)] = left
        return row

    def measure(self, logits: "jax.Array", targets: "jax.Array") -> dict[str, "jax.Array"]:
        return {}

    def evaluated(self, logits: "jax.Array", labels: "jax.Array", mask: "jax.Array") -> dict[str, "jax.Array"]:
        import jax.numpy as jnp

        from tnt_jax.tasks.detection_losses import detection_loss

        loss = jnp.where(jnp.isfinite(logits).all(range(1, logits.ndim)), detection_loss(logits, labels), jnp.nan)
        return {"found": self.activated(logits), "labels": labels, "mask": mask, "loss": loss}

    def _total(self, batches: list[dict[str, np.ndarray]], outputs: Outputs) -> tuple[int, dict[str, float]]:
        mask = np.concatenate([batch["mask"] for batch in batches])
        found, labels, loss = (
            np.concatenate([np.asarray(batch[name]) for batch in batches])[mask] for name in ("found", "labels", "loss")
        )
        if not np.isfinite(loss).all():
            return len(loss), {metric.name: np.nan for metric in METRICS}
        predicted = self.predictions((found, labels, loss), outputs, None, np.nan)
        scores = coco_scores(coco_evaluation(predicted.found, labels, predicted.classes))
        return len(loss), scores | {"loss": float(loss.mean())}

    def in_classes(self, logits: "jax.Array", chosen: Any) -> "jax.Array":
        import jax.numpy as jnp

        rest = 8 if logits.ndim == 3 else 5
        return jnp.concatenate([logits[..., :-rest][..., chosen], logits[..., -rest:]], axis=-1)

    def mirrored(self, logits: "jax.Array") -> "jax.Array":
        raise InputError("tta flip takes means of outputs, and boxes have none; the task of the model is detection")

    def of_each_image(self, logits: "jax.Array", labels: "jax.Array", asked: np.ndarray) -> tuple["jax.Array", ...]:
        of_batch = self.evaluated(logits, labels, labels)
        return of_batch["found"], labels, of_batch["loss"]

    def predictions(self, arrays: Sequence[np.ndarray], outputs: Outputs, chosen: Any, rate: float) -> BoxPredictions:
        found, labels, loss = arrays
        classes = int(max(found[..., 5].max(initial=0), labels[:, 1:, 4].max(initial=0))) + 1
        of_images = [_of_image(boxes, label) for boxes, label in zip(found, labels, strict=True)]
        return BoxPredictions(of_images, labels, loss, rate, classes)

    def activated(self, logits: "jax.Array") -> "jax.Array":
        """The best boxes of each image, (batch, boxes, 6): corners as shares, score, class; a score of 0 is none.

        Of anchors those that no better one of their class overlaps by half; of queries each with its likeliest class.
        """
        import jax
        import jax.numpy as jnp

        def of_anchors(logits):
            scores, boxes = jax.nn.sigmoid(logits[:, :-8]), decode(logits[:, -8:-4], logits[:, -4:]).clip(0, 1)
            classes = scores.shape[1]
            best, places = jax.lax.top_k(scores.ravel(), min(CANDIDATES, scores.size))
            found, names = boxes[places // classes], places % classes
            best = jnp.where((best < LEAST_SCORE) | suppressed(found, names), 0, best)
            return found, best, names

        def of_queries(logits):
            chances = jax.nn.softmax(logits[-1, :, :-4])[:, :-1]
            return corners(logits[-1, :, -4:]).clip(0, 1), chances.max(-1), chances.argmax(-1)

        def of_image(logits):
            found, best, names = (of_anchors if logits.ndim == 2 else of_queries)(logits)
            best, places = jax.lax.top_k(best, min(MOST_FOUND, len(best)))
            return jnp.concatenate([found[places], best[:, None], names[places][:, None]], axis=1)

        return jax.lax.map(of_image, logits)

    def join(self, windows: Iterable[tuple[int, int, np.ndarray]], canvas: Canvas) -> Float[np.ndarray, "boxes 6"]:
        """The boxes of all windows in pixels of the image; of those in several windows the best."""
        found = []
        (height, width), (rows, columns) = canvas.window, canvas.image
        for row, column, boxes in windows:
            boxes = boxes[boxes[:, 4] > 0].copy()
            boxes[:, :4] = boxes[:, :4] * np.array([width, height] * 2) + np.array([column, row] * 2)
            boxes[:, :4] -= np.array([canvas.left, canvas.top] * 2)
            boxes[:, :4] *= np.array([columns / canvas.width, rows / canvas.height] * 2)
            boxes[:, :4] = boxes[:, :4].clip(0, np.array([columns, rows] * 2))
            found.append(boxes[((boxes[:, 2:4] - boxes[:, :2]) > 0).all(1)])
        best = np.concatenate(found)
        best = best[np.argsort(-best[:, 4], kind="stable")]
        if len(found) > 1 and len(best):
            best = best[~np.asarray(suppressed(best[:, :4], best[:, 5]))]
        return best[:MOST_FOUND]

    def result(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> dict[str, Any]:
        labels = scores[:, 5].astype(int).tolist()
        return {
            "pred_boxes": scores[:, :4],
            "pred_scores": scores[:, 4],
            "pred_labels": labels,
            "pred_classes": [class_name(label, names) for label in labels],
        }

    def answer(self, result: dict[str, Any], names: Sequence[str] | None, count: int) -> Answer:
        """Boxes as COCO has them: left, top, width, height in pixels of the image."""
        each = (result[name] for name in ("pred_labels", "pred_classes", "pred_boxes", "pred_scores"))
        found = [
            {"category_id": label, "class": name, "bbox": [round(side, 2) for side in _xywh(box)]}
            | {"score": float(score)}
            for label, name, box, score in zip(*each, strict=True)
        ]
        rows = [
            {"class": box["class"], "score": box["score"], "box": ", ".join(f"{side:.1f}" for side in box["bbox"])}
            for box in found[:count]
        ]
        cells = {f"{name}_{rank}": value for rank, row in enumerate(rows, 1) for name, value in row.items()}
        return Answer({"boxes": found}, rows, cells)

    def pictures(self, result: dict[str, Any], image: np.ndarray) -> dict[str, Image.Image]:
        """The image with its boxes of a score of at least a half, in the colours of their classes."""
        drawn = Image.fromarray(image)
        pen = ImageDraw.Draw(drawn)
        colours = palette(max(result["pred_labels"], default=0) + 2)[1:]
        width = max(1, round(max(image.shape[:2]) / 250))
        for box, score, label, name in zip(
            result["pred_boxes"], result["pred_scores"], result["pred_labels"], result["pred_classes"], strict=True
        ):
            if score >= SHOWN_SCORE:
                colour = tuple(int(value) | 96 for value in colours[label])
                pen.rectangle(box.tolist(), outline=colour, width=width)
                pen.text((box[0] + width + 1, box[1] + width), f"{short(name)} {score:.0%}", fill=colour)
        return {"_boxes.png": drawn}

    def shown(self, result: dict[str, Any], names: Sequence[str] | None) -> str:
        each = zip(result["pred_classes"], result["pred_scores"], strict=True)
        return ", ".join(name for name, score in each if score >= SHOWN_SCORE) or "nothing"

    def caption(self, label: np.ndarray, target: np.ndarray, names: Sequence[str]) -> str:
        there = [short(names[int(row[4])]) for row in label[1:] if row[4] >= 0]
        return ", ".join(there[:4]) + (f" and {len(there) - 4} more" if len(there) > 4 else "") or "no box"

    def meaning(self, outputs: Outputs) -> list[str]:
        return [
            "The outputs are, of each anchor, logits of the classes (sigmoid), the encoded box and the anchor; or of "
            "each query logits of the classes and of none (softmax), and a box by its centre, width and height. Boxes "
            "are shares of the image."
        ]


def _of_image(found: Float[np.ndarray, "boxes 6"], label: np.ndarray) -> Float[np.ndarray, "boxes 6"]:
    """The boxes that were found of an image, in pixels of the whole one."""
    found = found[found[:, 4] > 0].copy()
    found[:, :4] = _to_pixels(found[:, :4], label)
    return found
