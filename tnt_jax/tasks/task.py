"""The protocol of tasks: all that the house asks of one. Each has a file of its own, and its line in `table.py`.

Data workers import these files, so JAX is imported where a method computes on the device.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from tnt_jax.errors import InputError
from tnt_jax.tasks.calibration import Calibration
from tnt_jax.tasks.metrics import Metric

if TYPE_CHECKING:
    import jax
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The meaning of a model's outputs."""

    task: str = "single_label"
    """One class (softmax), a probability of each label (sigmoid), or numbers."""
    thresholds: tuple[float, ...] | None = None
    """multi_label: the probability from which on each label is predicted; None for 0.5."""
    target_mean: tuple[float, ...] | None = None
    """regression: an output times `target_std`, plus this, is in the units of its target; None for 0 and 1."""
    target_std: tuple[float, ...] | None = None


class Answer(NamedTuple):
    """A model's answer for an image, as `predict.py` prints it."""

    fields: dict[str, Any]
    """Of a line of JSON."""
    rows: list[dict[str, Any]]
    """Of a table: one for each class, label or target."""
    cells: dict[str, Any]
    """Of a line of CSV."""


class Matrix(NamedTuple):
    """A confusion matrix."""

    counts: np.ndarray
    """By what is right (rows) and what was predicted (columns)."""
    totals: np.ndarray
    """Of each row."""
    rows: Sequence[str]
    columns: Sequence[str]
    title: str
    of: str = "images"
    """The things that are counted."""


class Scatter(NamedTuple):
    """Predictions over targets, in a panel for each output."""

    targets: np.ndarray
    values: np.ndarray
    titles: Sequence[str]


class Mistakes(NamedTuple):
    """The worst predictions."""

    images: np.ndarray
    """Their numbers, the worst first."""
    captions: list[str]
    title: str
    pictures: Sequence[np.ndarray] | None = None
    """One to be drawn beside each, 8 bits RGB."""


class Canvas(NamedTuple):
    """An image, resized, in an array that windows cover: a place, and sizes (height, width)."""

    window: tuple[int, int]
    """Of each window."""
    top: int
    left: int
    height: int
    width: int
    """Of the resized image, which begins at `top` and `left`."""
    image: tuple[int, int]
    """Of the image itself."""


class Predictions(abc.ABC):
    """A model's predictions for a number of images."""

    loss: np.ndarray
    """Of each image."""
    images_per_second: float
    """NaN where one batch was all there was: the first is compiled, and says nothing of the rate."""

    @abc.abstractmethod
    def metrics(self) -> dict[str, float]:
        """images, the metrics of the task, of some the ends of their 95% intervals, loss (mean), images_per_second."""

    @abc.abstractmethod
    def per_output(self, names: Sequence[str]) -> list[dict]:
        """A row for each class that has images, for each label, or for each target."""

    @abc.abstractmethod
    def rows(self, names: Sequence[str]) -> list[dict]:
        """A row for each image: the truth and the prediction."""

    @abc.abstractmethod
    def confusion(self, names: Sequence[str]) -> Matrix | Scatter:
        """The true classes against the predicted ones, or targets against predictions."""

    @abc.abstractmethod
    def mistakes(self, names: Sequence[str], count: int) -> Mistakes:
        """The `count` worst predictions. Raises InputError where all are right."""

    def _loss_and_rate(self) -> dict[str, float]:
        return {"loss": float(self.loss.mean()), "images_per_second": self.images_per_second}


MIXING = ("data.mixup", "data.cutmix", "data.label_smoothing")


class Task(abc.ABC):
    """A task: the labels of an image, and all that follows from them.

    What this class itself has is for tasks with several numbers for each image, in float32. Labels are what the source
    says of images; targets, what the network is to say, after smoothing and mixing; logits, what its head says.
    """

    name: str
    noun: str
    """The name of its outputs, in the plural."""
    metrics: tuple[Metric, ...]
    """Those that training has; by the first the best checkpoint is chosen."""
    losses: tuple[str, ...]
    """Of `tnt_jax.tasks.losses.LOSSES`; the first is taken."""
    settings: tuple[str, ...] = MIXING
    """Fields of a configuration that not every task can have, and this one can."""
    told: Literal["labels", "masks", "boxes"] = "labels"
    """Of an image: a label of all of it, or a mask or boxes, which move with its pixels; evaluation shows it whole."""
    heads: tuple[str, ...] = ("class",)
    """Of a model: the first is for the image; the others over its pixels. As `ModelConfig.head` has them."""
    weighs_classes: bool = True
    """True if `loss.class_weights` may be numbers."""
    output_fields: tuple[str, ...] = ()
    """Fields of `Outputs` that are its own: a number for each output."""
    one_class: bool = False
    """True if an image has one class, as probes and explanations need it."""
    has_probabilities: bool = True
    label_columns: tuple[str, ...]
    """The usual names of the column of its labels."""
    needs: str
    """Its labels, in words."""
    sources: str = "a source of labels"
    """Those that have such labels, in words."""
    wanted: str
    """The numbers that a label may have, in words."""
    pipeline: str | None = "image-classification"
    """Of the Hugging Face hub."""
    tag: str = "image-classification"
    problem_type: str | None = None
    """As transformers calls it, where it is not one class."""

    @property
    def dense(self) -> bool:
        """True if labels move with the pixels of their image."""
        return self.told != "labels"

    def losses_of(self, head: str) -> tuple[str, ...]:
        """The `losses` that a model with this head can have."""
        return self.losses

    # What a source says of images

    label_dtype: str = "float32"

    def label_shape(self, outputs: int, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the label of an image in a batch."""
        return (outputs,)

    def is_wrong(self, labels: np.ndarray) -> Bool[np.ndarray, "images outputs"]:
        """The numbers that no label can be."""
        return ~np.isfinite(labels)

    def check_labels(self, labels: np.ndarray, names: Sequence[str], split: str) -> None:
        """Raises InputError unless the labels of a split are what the task needs."""
        self._check_shape(labels, names, split, labels.ndim == 2 and labels.shape[1] == len(names))
        wrong = self.is_wrong(labels)
        if wrong.any():
            image, output = np.argwhere(wrong)[0]
            raise InputError(
                f"{split} has {labels[image, output]} for {names[output]!r} of image {image}; data.task {self.name} "
                f"needs {self.wanted}"
            )

    def _check_shape(self, labels: np.ndarray, names: Sequence[str], split: str, is_right: bool) -> None:
        if not is_right:
            raise InputError(
                f"{split} has targets of shape {labels.shape} and {len(names)} names; data.task {self.name} needs "
                f"{self.needs}"
            )

    def nothing_to_learn(self, labels: np.ndarray, names: Sequence[str]) -> str | None:
        """The reason why nothing can be learned from the training labels; None where something can."""
        return None

    def labels_of_array(self, values: np.ndarray, name: str, argument: str) -> np.ndarray:
        """The labels of images that a file of NumPy holds; `name` and `argument` are for messages."""
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.dtype.kind not in "buif":
            raise InputError(
                f"{argument}: {name} is {values.dtype} {values.shape}; should be numbers (images, outputs)"
            )
        values = values.astype(np.float32)
        wrong = self.is_wrong(values)
        if wrong.any():
            place = tuple(map(int, np.argwhere(wrong)[0]))
            raise InputError(f"{argument}: {name} has {values[place]} in place {place}, and should have {self.wanted}")
        return values

    def usual_columns(self, names: Sequence[str], labels: Any) -> list[str]:
        """The columns with labels of a table in which none is called as usual, of `tnt_jax.data.columns.Labels`."""
        return []

    @abc.abstractmethod
    def labels_of_columns(self, names: Sequence[str], labels: Any) -> tuple:
        """The labels of all rows of a table, as `labels` reads them. Raises InputError where the columns do not fit."""

    def notes(self, names: Sequence[str], moving: Mapping[str, Any]) -> list[str]:
        """Notes for people before it is trained; `moving` are the settings that move the content of an image."""
        return []

    # Training

    def moved(self, label: Any, places: Any) -> Any:
        """The label of an image that was prepared; `places` are `tnt_jax.data.moving.Places`."""
        return label

    def statistics(self, labels: Callable[[], np.ndarray]) -> dict[str, tuple[float, ...]]:
        """Fields of `Outputs` that the training labels say."""
        return {}

    def standardised(self, labels: Any, outputs: Outputs) -> Any:
        """Labels of a batch as the network learns them."""
        return labels

    @abc.abstractmethod
    def soft_targets(self, labels: "jax.Array", outputs: int, smoothing: float) -> "jax.Array":
        """Targets of a batch, float32 (batch, outputs)."""

    @abc.abstractmethod
    def measure(self, logits: "jax.Array", targets: "jax.Array") -> dict[str, "jax.Array"]:
        """The values that are reported of a training batch beside its loss, by the name of a metric."""

    def evaluated(self, logits: "jax.Array", labels: "jax.Array", mask: "jax.Array") -> dict[str, "jax.Array"]:
        """The arrays of a batch that `scores` needs."""
        return {"outputs": logits, "labels": labels, "mask": mask}

    def scores(self, batches: Iterable[dict[str, np.ndarray]], outputs: Outputs) -> dict[str, float | None]:
        """The metrics over all batches, and count, the number of images.

        A metric that is undefined for these images, as R2 of one image is, is None. The loss is NaN where an output is
        not finite.
        """
        count, found = self._total(list(batches), outputs)
        undefined = {name for name in found if name != "loss" and math.isnan(found[name])}
        names = [metric.name for metric in self.metrics]
        return {"count": count} | {name: None if name in undefined else float(found[name]) for name in names}

    def _total(self, batches: list[dict[str, np.ndarray]], outputs: Outputs) -> tuple[int, dict[str, float]]:
        mask = np.concatenate([batch["mask"] for batch in batches])
        logits, labels = (
            np.concatenate([np.asarray(batch[name]) for batch in batches])[mask] for name in ("outputs", "labels")
        )
        if not np.isfinite(logits).all():
            return len(logits), {metric.name: math.nan for metric in self.metrics}
        return len(logits), self.scores_of(logits, labels, outputs)

    def scores_of(self, logits: np.ndarray, labels: np.ndarray, outputs: Outputs) -> dict[str, float]:
        """The metrics of finite logits."""
        raise NotImplementedError

    # Evaluation

    def in_classes(self, logits: "jax.Array", chosen: Any) -> "jax.Array":
        """The logits of some of the classes, in another order."""
        return logits[..., chosen]

    def mirrored(self, logits: "jax.Array") -> "jax.Array":
        """The logits of mirror images as those of the images."""
        return logits

    def of_each_image(self, logits: "jax.Array", labels: "jax.Array", asked: np.ndarray) -> tuple["jax.Array", ...]:
        """The arrays that `predictions` needs of each image of a batch; `asked`: the classes of the source, bool."""
        return labels, logits

    @abc.abstractmethod
    def predictions(self, arrays: Sequence[np.ndarray], outputs: Outputs, chosen: Any, rate: float) -> Predictions:
        """The predictions for all images; `chosen` are the outputs of the model that the source has."""

    def calibrate(self, logits: np.ndarray, labels: np.ndarray, source: str) -> Calibration:
        """The calibration of logits, of a task with probabilities. Raises InputError where these do not say
        it."""
        raise NotImplementedError

    # One image

    @abc.abstractmethod
    def activated(self, logits: "jax.Array") -> "jax.Array":
        """Probabilities, or numbers as they are."""

    @abc.abstractmethod
    def result(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> dict[str, Any]:
        """The result of `inference_model` for an image, from its `activated` outputs."""

    def answer(self, result: dict[str, Any], names: Sequence[str] | None, count: int) -> Answer:
        """A result for people and programs, with the `count` likeliest classes or labels."""
        scores, rows = result["pred_scores"], []
        for label in np.argsort(-scores, kind="stable")[:count].tolist():
            rows.append({"label": label, "class": class_name(label, names), "score": float(scores[label])})
        cells = {f"{name}_{rank}": value for rank, row in enumerate(rows, 1) for name, value in row.items()}
        fields = {name: value for name, value in result.items() if name != "pred_scores"}
        return Answer(fields | {"top": rows}, rows, cells)

    def shown(self, result: dict[str, Any], names: Sequence[str] | None) -> dict[str, float] | str:
        """A result as a `gradio.Label` shows it: a tick marks labels that are predicted."""
        rows = self.answer(result, names, 5).rows
        return {f"✓ {row['class']}" if row.get("predicted") else row["class"]: row["score"] for row in rows}

    def reasons(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> tuple[list[int], list[str]]:
        """The outputs to explain where nobody names one, and a title for each that there is."""
        titles = [f"{class_name(label, names)}: {score:.1%}" for label, score in enumerate(scores)]
        return self.result(scores, outputs, names).get("pred_labels") or [int(scores.argmax())], titles

    @abc.abstractmethod
    def caption(self, label: np.ndarray, target: np.ndarray, names: Sequence[str]) -> str:
        """Of a training image: what is told of it, and below it what the network should predict."""

    # A model

    def meaning(self, outputs: Outputs) -> list[str]:
        """The sentences of the model card about the outputs."""
        return []


class DenseTask(Task):
    """A task whose labels lie over the pixels of their image: they move with them, and the source has both at once."""

    settings = ()
    label_columns = ()

    def check_labels(self, labels: np.ndarray, names: Sequence[str], split: str) -> None:
        """Each label is checked where it is read."""

    def labels_of_array(self, values: np.ndarray, name: str, argument: str) -> np.ndarray:
        raise InputError(f"{argument} has not {self.needs}: take {self.sources}")

    def labels_of_columns(self, names: Sequence[str], labels: Any) -> tuple:
        raise InputError(f"{labels.path} has not {self.needs}: take {self.sources}")

    @abc.abstractmethod
    def moved(self, label: Any, places: Any) -> Any: ...

    def soft_targets(self, labels: "jax.Array", outputs: int, smoothing: float) -> "jax.Array":
        """The labels as they are."""
        return labels

    @abc.abstractmethod
    def join(self, windows: Iterable[tuple[int, int, np.ndarray]], canvas: Canvas) -> np.ndarray:
        """The argument of `result` for an image.

        Args:
            windows: the first row and column of each, and what is `activated` of it.
        """

    @abc.abstractmethod
    def pictures(self, result: dict[str, Any], image: np.ndarray) -> "dict[str, Image]":
        """Pictures of a result, by the ends of their names; `image` is 8 bits RGB."""

    def reasons(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> tuple[list[int], list[str]]:
        raise InputError(f"what is explained is one prediction of an image, and the task of the model is {self.name}")


def class_name(label: int, names: Sequence[str] | None) -> str:
    """The name of a class, or its number where no names are known."""
    return names[label] if names and label < len(names) else str(label)


def likely_targets(target: np.ndarray, names: Sequence[str], count: int) -> str:
    """The greatest soft targets of an image, for a caption."""
    likely = [index for index in np.argsort(-target, kind="stable")[:count] if target[index] > 0.05]
    return ", ".join(f"{target[index]:.2f} {names[index]}" for index in likely) or "none"


def no_mistakes(count: int) -> InputError:
    """The error where there is nothing to show."""
    return InputError(f"there are no mistakes: all {count} predictions are right")


def short(name: str) -> str:
    """A name that fits below a small image."""
    return name if len(name) <= 16 else f"{name[:15]}…"
