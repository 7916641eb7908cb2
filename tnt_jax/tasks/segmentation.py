"""The class of each pixel: softmax, cross-entropy and Dice.

Labels are uint16 (height, width); `IGNORED` is what has no class, and counts nowhere.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Num, UInt8, UInt16
from PIL import Image

from tnt_jax.tasks import task
from tnt_jax.tasks.bootstrap import intervals, resamples
from tnt_jax.tasks.metrics import LOSS, Metric, computed, mean_of_defined, proportion, quotient, with_intervals
from tnt_jax.tasks.single_label import ClassCounts
from tnt_jax.tasks.task import Answer, Canvas, Matrix, Mistakes, Outputs, Predictions, class_name, short

if TYPE_CHECKING:
    import jax

IGNORED = 65535
SHOWN = 128
"""Pixels along a side of the maps that are kept of every image, for pictures."""


def class_iou(counts: ClassCounts) -> np.ndarray:
    """Intersection over union of each class; NaN where neither labels nor predictions have it."""
    union = counts.labelled + counts.predicted - counts.right
    return np.where(union > 0, quotient(counts.right, union), np.nan)


METRICS = (
    proportion("miou", lambda n: n.mean(np.nan_to_num(class_iou(n))), "mIoU", interval=True),
    proportion(
        "pixel_accuracy",
        lambda n: quotient(n.right.sum(axis=-1), n.labelled.sum(axis=-1)),
        interval=True,
        of_batch="pixel_accuracy",
    ),
    LOSS,
)
OF_CLASS = Metric("iou", function=class_iou, interval=True)


def counts_of(confusion: Num[np.ndarray, "*images classes classes"]) -> ClassCounts:
    """Pixels of each class that are right, labelled and predicted."""
    return ClassCounts(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1), confusion.sum(axis=-2))


def palette(count: int) -> UInt8[np.ndarray, "count 3"]:
    """A colour for each class, black for the first: Pascal VOC's, bit by bit of the number."""
    numbers, colours = np.arange(count), np.zeros((count, 3), np.int64)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= (numbers >> (3 * place + channel) & 1) << (7 - place)
    return colours.astype(np.uint8)


def coloured(labels: UInt16[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """Each class in its colour, and grey what is ignored."""
    colours = np.concatenate([palette(int(labels.max(initial=0, where=labels != IGNORED)) + 1), [[128] * 3]])
    return colours[np.where(labels == IGNORED, len(colours) - 1, labels)].astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class MaskPredictions(Predictions):
    """A model's predictions for the pixels of a number of images, at the size at which it saw them."""

    confusions: Int[np.ndarray, "images classes classes"]
    """Pixels of each image by their class (rows) and what was predicted (columns)."""
    loss: Float[np.ndarray, " images"]
    """Cross-entropy in nats, the mean over the pixels that have a class."""
    labels: UInt16[np.ndarray, "images rows columns"]
    """Every so manieth pixel of the masks."""
    values: UInt16[np.ndarray, "images rows columns"]
    """The same of what was predicted."""
    images_per_second: float

    def metrics(self) -> dict[str, float]:
        found = computed(METRICS, counts_of(self.confusions.sum(axis=0)))
        values = {name: float(value) for name, value in found.items()}
        return {"images": len(self.loss)} | with_intervals(values, self.intervals(METRICS)) | self._loss_and_rate()

    def intervals(self, metrics: Sequence[Metric], classes: Any = slice(None)) -> dict[str, tuple]:
        """The 95% intervals over the images, from some of the classes."""
        each = ClassCounts(*(of_images[:, classes] for of_images in counts_of(self.confusions)))

        def resampled() -> Iterator[ClassCounts]:
            for drawn in resamples(*each.right.shape):
                yield ClassCounts(*(drawn @ of_images for of_images in each))

        return intervals(metrics, resampled())

    def per_output(self, names: Sequence[str]) -> list[dict]:
        """For each class that images have or that was predicted: in how many masks it is, IoU, recall and precision."""
        total, each = counts_of(self.confusions.sum(axis=0)), counts_of(self.confusions)
        found, rows = class_iou(total), []
        there = np.flatnonzero(~np.isnan(found))
        ends = zip(*self.intervals([OF_CLASS], there)["iou"], strict=True)
        recall, precision = quotient(total.right, total.labelled), quotient(total.right, total.predicted)
        for label, interval in zip(there, ends, strict=True):
            row = {"class": names[label], "images": int((each.labelled[:, label] > 0).sum())}
            row |= with_intervals({"iou": float(found[label])}, {"iou": interval})
            rows.append(row | {"recall": float(recall[label]), "precision": float(precision[label])})
        return rows

    def rows(self, names: Sequence[str]) -> list[dict]:
        found = computed(METRICS, counts_of(self.confusions))
        return [{name: float(values[image]) for name, values in found.items()} for image in range(len(self.loss))]

    def confusion(self, names: Sequence[str]) -> Matrix:
        """Rows are the right classes, columns the predicted ones, in pixels."""
        counts, shown = self.confusions.sum(axis=0, dtype=np.int64), self.metrics()
        title = f"{len(self.loss):,} images, mIoU {shown['miou']:.2%}, {shown['pixel_accuracy']:.2%} of the pixels"
        return Matrix(counts, counts.sum(axis=1), names, names, title, "pixels")

    def mistakes(self, names: Sequence[str], count: int) -> Mistakes:
        """The images of the lowest mIoU; beside each its mask and what was predicted."""
        of_image = np.array([mean_of_defined(each) for each in class_iou(counts_of(self.confusions))])
        wrong = np.flatnonzero(of_image < 1)
        if not len(wrong):
            raise task.no_mistakes(len(of_image))
        worst, captions, pictures = wrong[np.argsort(of_image[wrong], kind="stable")][:count], [], []
        for index in worst:
            errors = self.confusions[index] * ~np.eye(len(names), dtype=bool)
            label, value = np.unravel_index(errors.argmax(), errors.shape)
            captions.append(f"mIoU {of_image[index]:.0%}\n{short(names[value])}\nis {short(names[label])}")
            pictures.append(np.concatenate([coloured(self.labels[index]), coloured(self.values[index])], axis=1))
        title = f"{len(of_image):,} images; those of the lowest mIoU, with their mask and the prediction"
        return Mistakes(worst, captions, title, pictures)


class Segmentation(task.DenseTask):
    """Labels are uint16 (images, height, width), and come with their image."""

    name = "segmentation"
    noun = "classes"
    told = "masks"
    heads = ("linear", "mlp", "mlp_words")
    metrics = METRICS
    losses = ("cross_entropy_dice", "pixel_cross_entropy")
    settings = ("data.ignore",)
    label_columns = ("mask", "masks", "mask_path", "segmentation", "label")
    needs = "a mask of each image"
    sources = "masks:PATH, csv:FILE or tfds:NAME"
    wanted = "the number of a class in each pixel"
    pipeline = tag = "image-segmentation"
    label_dtype = "uint16"

    def label_shape(self, outputs: int, image_size: tuple[int, int]) -> tuple[int, ...]:
        return image_size

    def moved(self, label: UInt16[np.ndarray, "height width"], places: Any) -> np.ndarray:
        return places.of_mask(label, IGNORED)

    def measure(self, logits: "jax.Array", targets: "jax.Array") -> dict[str, "jax.Array"]:
        right, seen = logits.argmax(-1) == targets, targets < logits.shape[-1]
        return {"pixel_accuracy": (right & seen).sum() / seen.sum().clip(1)}

    def evaluated(self, logits: "jax.Array", labels: "jax.Array", mask: "jax.Array") -> dict[str, "jax.Array"]:
        """Sums over the images."""
        import jax.numpy as jnp

        confusions, loss = self._of_images(logits, labels)
        of_all = jnp.where(mask[:, None, None], confusions, 0).sum(0)
        return {"count": mask.sum(), "loss": jnp.where(mask, loss, 0).sum(), "confusion": of_all}

    @staticmethod
    def _of_images(logits: "jax.Array", labels: "jax.Array") -> tuple["jax.Array", "jax.Array"]:
        """The confusion of each image, int32 (images, classes, classes), and its cross-entropy."""
        import jax
        import jax.numpy as jnp

        from tnt_jax.tasks.losses import Objective, pixel_cross_entropy

        classes = logits.shape[-1]
        # What is ignored is no class: a row of zeros. A product is exact to 2^24 pixels, and no scatter.
        own, predicted = (jax.nn.one_hot(each, classes) for each in (labels, logits.argmax(-1)))
        confusions = jnp.einsum("bhwt,bhwp->btp", own, predicted).astype(jnp.int32)
        loss = pixel_cross_entropy(Objective(Segmentation(), Outputs()), logits, labels)
        return confusions, jnp.where(jnp.isfinite(logits).all((1, 2, 3)), loss, jnp.nan)

    def _total(self, batches: list[dict[str, np.ndarray]], outputs: Outputs) -> tuple[int, dict[str, float]]:
        sums = {name: sum(np.asarray(batch[name], np.float64) for batch in batches) for name in batches[0]}
        count = int(sums["count"])
        found = {name: float(value) for name, value in computed(METRICS, counts_of(sums["confusion"])).items()}
        return count, found | {"loss": float(sums["loss"]) / count}

    def mirrored(self, logits: "jax.Array") -> "jax.Array":
        return logits[:, :, ::-1]

    def of_each_image(self, logits: "jax.Array", labels: "jax.Array", asked: np.ndarray) -> tuple["jax.Array", ...]:
        import jax.numpy as jnp

        asked = jnp.where(asked, logits, jnp.finfo(logits.dtype).min)
        confusions, loss = self._of_images(asked, labels)
        every = -(-max(labels.shape[1:]) // SHOWN)
        shown = (each[:, ::every, ::every].astype(jnp.uint16) for each in (labels, asked.argmax(-1)))
        return confusions, loss, *shown

    def predictions(self, arrays: Sequence[np.ndarray], outputs: Outputs, chosen: Any, rate: float) -> MaskPredictions:
        return MaskPredictions(*arrays, rate)

    def activated(self, logits: "jax.Array") -> "jax.Array":
        import jax

        return jax.nn.softmax(logits)

    def join(
        self, windows: Iterable[tuple[int, int, np.ndarray]], canvas: Canvas
    ) -> UInt16[np.ndarray, "height width"]:
        """The class of the highest probability: the mean over the windows, brought to the size of the image."""
        shape, size = (canvas.height, canvas.width), canvas.image
        total, times = np.zeros(0, np.float32), np.zeros((*shape, 1), np.float32)
        for row, column, found in windows:
            # The image lies inside of the only window, or all windows inside of the image.
            found = found[canvas.top :, canvas.left :][: canvas.height, : canvas.width]
            place = slice(row, row + found.shape[0]), slice(column, column + found.shape[1])
            total = total if total.size else np.zeros((*shape, found.shape[-1]), np.float32)
            total[place] += found
            times[place] += 1
        total /= times
        # Class by class: all at once are gigabytes of a large photograph.
        most, likeliest = np.full(size, -1, np.float32), np.zeros(size, np.uint16)
        for label in range(total.shape[-1]):
            own = Image.fromarray(np.ascontiguousarray(total[..., label]))
            own = np.asarray(own.resize(size[::-1], Image.Resampling.BILINEAR))
            likeliest[own > most] = label
            most = np.maximum(most, own)
        return likeliest

    def result(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> dict[str, Any]:
        counts = np.bincount(scores.ravel())
        shares = {class_name(label, names): float(counts[label] / scores.size) for label in np.flatnonzero(counts)}
        return {"pred_mask": scores, "pred_shares": shares}

    def answer(self, result: dict[str, Any], names: Sequence[str] | None, count: int) -> Answer:
        shares = sorted(result["pred_shares"].items(), key=lambda pair: -pair[1])
        rows = [{"class": name, "share": share} for name, share in shares[:count]]
        filled = rows + [{"class": None, "share": None}] * (count - len(rows))  # every line has the same columns
        cells = {f"{name}_{rank}": value for rank, row in enumerate(filled, 1) for name, value in row.items()}
        return Answer({"pred_shares": dict(shares)}, rows, cells)

    def pictures(self, result: dict[str, Any], image: UInt8[np.ndarray, "height width 3"]) -> dict[str, Image.Image]:
        """The mask, in a palette or in 16 bits, and the image with its classes in their colours."""
        labels = result["pred_mask"]
        if labels.max() < IGNORED >> 8:
            mask = Image.fromarray(labels.astype(np.uint8))
            mask.putpalette(palette(256).tobytes())
        else:
            mask = Image.fromarray(labels)
        return {".png": mask, "_overlay.png": Image.fromarray((image // 2 + coloured(labels) // 2).astype(np.uint8))}

    def shown(self, result: dict[str, Any], names: Sequence[str] | None) -> dict[str, float]:
        """The share of each class."""
        return result["pred_shares"]

    def caption(self, label: np.ndarray, target: np.ndarray, names: Sequence[str]) -> str:
        there = [names[each] for each in np.unique(label) if each != IGNORED]
        return ", ".join(map(short, there[:4])) + (f" and {len(there) - 4} more" if len(there) > 4 else "") or "ignored"

    def meaning(self, outputs: Outputs) -> list[str]:
        return ["The outputs are logits of the classes for every pixel of the image."]
