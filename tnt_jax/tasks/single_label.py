"""One class an image: softmax and cross-entropy."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from tnt_jax.errors import InputError
from tnt_jax.tasks import task
from tnt_jax.tasks.bootstrap import intervals, resamples_within
from tnt_jax.tasks.calibration import Calibration, calibration_error, sound_temperature
from tnt_jax.tasks.metrics import LOSS, computed, proportion, quotient, ranking, wilson, with_intervals
from tnt_jax.tasks.task import Matrix, Mistakes, Outputs, Predictions, class_name, short

if TYPE_CHECKING:
    import jax

Counts = Num[np.ndarray, "*resamples classes"]


class ClassCounts(NamedTuple):
    """For each class how many images were rightly given it, have it, and were given it."""

    right: Counts
    labelled: Counts
    predicted: Counts

    def mean(self, of_classes: Counts) -> Float[np.ndarray, "*resamples"]:
        """Over the classes that images have or that were predicted, as scikit-learn takes macro means."""
        return quotient(of_classes.sum(axis=-1), (self.labelled + self.predicted > 0).sum(axis=-1))

    def macro_f1(self) -> Float[np.ndarray, "*resamples"]:
        """The mean F1."""
        return self.mean(quotient(2 * self.right, self.labelled + self.predicted))

    def balanced_accuracy(self) -> Float[np.ndarray, "*resamples"]:
        """The mean recall of the classes that images have."""
        return quotient(quotient(self.right, self.labelled).sum(axis=-1), (self.labelled > 0).sum(axis=-1))


def count_right(labels: Int[np.ndarray, " images"], top1: Int[np.ndarray, " images"], classes: int) -> ClassCounts:
    """The counts of predicted classes."""
    return ClassCounts(*(np.bincount(each, minlength=classes) for each in (labels[labels == top1], labels, top1)))


METRICS = (
    proportion("top1", title="top-1", of_batch="accuracy"),
    proportion("top5", title="top-5"),
    proportion("balanced_accuracy", ClassCounts.balanced_accuracy, interval=True),
    proportion("macro_precision", lambda n: n.mean(quotient(n.right, n.predicted))),
    proportion("macro_recall", lambda n: n.mean(quotient(n.right, n.labelled))),
    proportion("macro_f1", ClassCounts.macro_f1, "macro F1", interval=True),
    LOSS,
)


@dataclasses.dataclass(frozen=True)
class ClassPredictions(Predictions):
    """A model's predictions for a number of images. Classes are those of the model."""

    labels: Int[np.ndarray, " images"]
    """The right classes."""
    top: Int[np.ndarray, "images k"]
    """The likeliest classes, up to five, the likeliest first."""
    scores: Float[np.ndarray, "images k"]
    """Their probabilities."""
    loss: Float[np.ndarray, " images"]
    """Cross-entropy in nats."""
    images_per_second: float

    accepted: Sequence[frozenset[int]] | None = None
    """All right classes of an image that has several. The others stand in `labels`."""

    def right(self, k: int) -> np.ndarray:
        """True for each image with a right class among the k likeliest, bool (images,)."""
        if self.accepted is None:
            return (self.top[:, :k] == self.labels[:, None]).any(axis=1)
        pairs = zip(self.accepted, self.top[:, :k].tolist(), strict=True)
        return np.array([not accepted.isdisjoint(top) for accepted, top in pairs])

    def rescored(self, accepted: Sequence[frozenset[int]]) -> "ClassPredictions":
        """The same predictions with other right ones. Images that have none are left out, and there is no loss."""
        kept = [index for index, classes in enumerate(accepted) if classes]
        return ClassPredictions(
            self.labels[kept],
            self.top[kept],
            self.scores[kept],
            np.full(len(kept), np.nan),
            self.images_per_second,
            [accepted[index] for index in kept],
        )

    def metrics(self) -> dict[str, float]:
        """As `Predictions`, with roc_auc where there are two classes, and ece."""
        count = len(self.labels)
        found: dict[str, float] = {"images": count}
        for k in (1, 5):
            right = int(self.right(k).sum())
            found |= with_intervals({f"top{k}": right / count}, {f"top{k}": wilson(right, count)})
        if self.accepted is None:
            counts = count_right(self.labels, self.top[:, 0], self._classes)
            values = {name: float(value) for name, value in computed(METRICS, counts).items()}
            found |= with_intervals(values, self.intervals())
            if self.top.shape[1] == self._classes == 2:
                second = np.where(self.top[:, 0] == 1, self.scores[:, 0], self.scores[:, 1])
                found["roc_auc"] = float(ranking(self.labels == 1, second)[1][0])
        found["ece"] = calibration_error(self.scores[:, 0], self.right(1))
        return found | self._loss_and_rate()

    @property
    def _classes(self) -> int:
        return 1 + int(max(self.labels.max(), self.top.max()))

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% intervals of metrics that are no proportion of the images, which are drawn within each class."""
        classes = self._classes
        cells, counts = np.unique(self.labels.astype(np.int64) * classes + self.top[:, 0], return_counts=True)
        label, prediction = np.divmod(cells, classes)

        def resampled() -> Iterator[ClassCounts]:
            for drawn in resamples_within(label, counts, len(cells) + classes):
                right = np.bincount(label, drawn * (label == prediction), classes)
                yield ClassCounts(right, *(np.bincount(each, drawn, classes) for each in (label, prediction)))

        return intervals(METRICS, resampled())

    def per_output(self, names: Sequence[str]) -> list[dict]:
        """For each class that has images: how many, how many were found (recall) with its interval, precision and F1.

        Precision is None where the class was never the prediction.
        """
        rows, predicted = [], np.bincount(self.top[:, 0], minlength=len(names))
        for label in np.unique(self.labels):
            of_class = self.labels == label
            right, images = int(self.right(1)[of_class].sum()), int(of_class.sum())
            recall = with_intervals({"recall": right / images}, {"recall": wilson(right, images)})
            precision = right / int(predicted[label]) if predicted[label] else None
            f1 = 2 * right / int(images + predicted[label])
            rows.append({"class": names[label], "images": images, **recall, "precision": precision, "f1": f1})
        return rows

    def rows(self, names: Sequence[str]) -> list[dict]:
        return [
            {
                "label": int(label),
                "class": class_name(label, names),
                "pred_label": int(top[0]),
                "pred_class": class_name(top[0], names),
                "pred_score": float(scores[0]),
                "top": " ".join(map(str, top)),
            }
            for label, top, scores in zip(self.labels, self.top, self.scores, strict=True)
        ]

    def confusion(self, names: Sequence[str]) -> Matrix:
        """Rows are the true classes, columns the predicted ones; classes without images have an empty row."""
        counts = np.zeros((len(names), len(names)), np.int64)
        np.add.at(counts, (self.labels, self.top[:, 0]), 1)
        title = f"{len(self.labels):,} images, {self.right(1).mean():.2%} right"
        return Matrix(counts, counts.sum(axis=1), names, names, title)

    def mistakes(self, names: Sequence[str], count: int) -> Mistakes:
        """The wrong predictions of the highest probability."""
        wrong = np.flatnonzero(~self.right(1))
        if not len(wrong):
            raise task.no_mistakes(len(self.labels))
        surest = wrong[np.argsort(-self.scores[wrong, 0], kind="stable")][:count]
        captions = [
            f"{short(names[self.top[index, 0]])} {self.scores[index, 0]:.0%}\nis {short(names[self.labels[index]])}"
            for index in surest
        ]
        title = f"{len(wrong):,} of {len(self.labels):,} predictions are wrong; those that the model was surest of"
        return Mistakes(surest, captions, title)


class SingleLabel(task.Task):
    """Labels are int, (images,)."""

    name = "single_label"
    noun = "classes"
    metrics = METRICS
    losses = ("cross_entropy", "binary_cross_entropy")
    settings = (*task.MIXING, "data.sampling", "loss.class_weights", "loss.focal_gamma")
    one_class = True
    label_columns = ("label", "labels", "class", "target", "category")
    needs = "one class of each image"
    label_dtype = "int32"

    def label_shape(self, outputs: int, image_size: tuple[int, int]) -> tuple[int, ...]:
        return ()

    def check_labels(self, labels: np.ndarray, names: Sequence[str], split: str) -> None:
        self._check_shape(labels, names, split, labels.ndim == 1)
        least, most = int(labels.min()), int(labels.max())
        if not 0 <= least <= most < len(names):
            raise InputError(f"{split} has labels from {least} to {most}, and there are {len(names)} classes")

    def labels_of_array(self, values: np.ndarray, name: str, argument: str) -> np.ndarray:
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1 or values.dtype.kind not in "ui":
            raise InputError(
                f"{argument}: {name} is {values.dtype} {values.shape}, and should be whole numbers (images,); "
                "--data.task multi_label or regression takes others"
            )
        if values.size and values.min() < 0:
            raise InputError(f"{argument}: {name} has {values.min()} in place {int(values.argmin())}")
        return values.astype(np.int32)

    def labels_of_columns(self, names: Sequence[str], labels: Any) -> tuple:
        if len(names) > 1:
            raise InputError(
                f"{labels.path}: {len(names)} columns of labels ({', '.join(names)}) fit --data.task multi_label or "
                "regression, and not single_label"
            )
        (name,) = names
        texts = labels.texts(name)
        if labels.has_lists(name):
            raise InputError(
                f"{labels.path}: column {name!r} has lists, which fit --data.task multi_label, and not single_label"
            )
        if len(texts) > 20 and all("." in text and _is_number(text) for text in texts):
            raise InputError(
                f"{labels.path}: column {name!r} has {len(texts)} different numbers such as {texts[0]}, which are no "
                "classes; --data.task regression predicts numbers"
            )
        return labels.classes(name)

    def notes(self, names: Sequence[str], moving: dict[str, Any]) -> list[str]:
        return [f"all images are of one class, {names[0]!r}: there is nothing to learn"] if len(names) == 1 else []

    def soft_targets(self, labels: "jax.Array", outputs: int, smoothing: float) -> "jax.Array":
        """Probabilities of the classes; smoothing spreads a share evenly over all of them."""
        import jax

        return jax.nn.one_hot(labels, outputs) * (1 - smoothing) + smoothing / outputs

    def measure(self, logits: "jax.Array", targets: "jax.Array") -> dict[str, "jax.Array"]:
        return {"accuracy": (logits.argmax(-1) == targets.argmax(-1)).mean()}

    def evaluated(self, logits: "jax.Array", labels: "jax.Array", mask: "jax.Array") -> dict[str, "jax.Array"]:
        """Sums over the images."""
        import jax
        import jax.numpy as jnp
        import optax

        classes = logits.shape[-1]
        _, likeliest = jax.lax.top_k(logits, min(5, classes))
        hit = likeliest == labels[:, None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = jnp.where(jnp.isfinite(logits).all(-1), loss, jnp.nan)
        values = {"count": jnp.ones_like(loss), "top1": hit[:, 0], "top5": hit.any(-1), "loss": loss}
        sums = {name: jnp.where(mask, value, 0).sum() for name, value in values.items()}
        predictions = likeliest[:, 0]
        chosen = {"right": (labels, mask & hit[:, 0]), "labelled": (labels, mask), "predicted": (predictions, mask)}
        return sums | {
            name: jnp.zeros(classes, jnp.int32).at[at].add(counts.astype(jnp.int32))
            for name, (at, counts) in chosen.items()
        }

    def _total(self, batches: list[dict[str, np.ndarray]], outputs: Outputs) -> tuple[int, dict[str, float]]:
        sums = {name: sum(np.asarray(batch[name], np.float64) for batch in batches) for name in batches[0]}
        counts = ClassCounts(*(sums.pop(name) for name in ("right", "labelled", "predicted")))
        count = int(sums.pop("count"))
        return count, {name: float(total) / count for name, total in sums.items()} | computed(METRICS, counts)

    def of_each_image(self, logits: "jax.Array", labels: "jax.Array", asked: np.ndarray) -> tuple["jax.Array", ...]:
        import jax
        import jax.numpy as jnp

        log = jax.nn.log_softmax(jnp.where(asked, logits, -jnp.inf))
        likeliest, top = jax.lax.top_k(log, min(5, int(asked.sum())))
        return labels, top, jnp.exp(likeliest), -jnp.take_along_axis(log, labels[:, None], axis=1)[:, 0]

    def predictions(self, arrays: Sequence[np.ndarray], outputs: Outputs, chosen: Any, rate: float) -> ClassPredictions:
        return ClassPredictions(*arrays, rate)

    def calibrate(self, logits: np.ndarray, labels: np.ndarray, source: str) -> Calibration:
        right = logits.argmax(axis=1) == labels
        temperature = sound_temperature(logits, labels, softmax_cross_entropy, right, source)

        def measured(logits: np.ndarray) -> dict[str, float]:
            probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
            right = probabilities.argmax(axis=1) == labels
            ece = calibration_error(probabilities.max(axis=1), right)
            return {"ece": ece, "loss": float(softmax_cross_entropy(logits, labels).mean())}

        return Calibration(temperature, None, len(labels), measured(logits), measured(logits / temperature))

    def activated(self, logits: "jax.Array") -> "jax.Array":
        """The probability of a single output is its sigmoid."""
        import jax

        return jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits, axis=-1)

    def result(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> dict[str, Any]:
        label = int(scores.argmax())
        known = {"pred_label": label, "pred_class": class_name(label, names), "pred_score": float(scores[label])}
        return {**known, "pred_scores": scores}

    def caption(self, label: np.ndarray, target: np.ndarray, names: Sequence[str]) -> str:
        return f"{names[label]}\n{task.likely_targets(target, names, 2)}"


def softmax_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each image, in nats."""
    return np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
