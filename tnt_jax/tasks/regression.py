"""Numbers of an image: squared error.

They are standardised: the network learns (target - mean) / std, with the mean and std of the training images.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tnt_jax.tasks import task
from tnt_jax.tasks.bootstrap import intervals, resamples
from tnt_jax.tasks.metrics import LOSS, Metric, Weights, computed, mean_of_defined, with_intervals
from tnt_jax.tasks.task import Answer, Mistakes, Outputs, Predictions, Scatter, class_name, short

if TYPE_CHECKING:
    import jax


class Errors(NamedTuple):
    """The statistics of predicted numbers that metrics need: means over the images of each resample."""

    square: Float[np.ndarray, "resamples outputs"]
    absolute: Float[np.ndarray, "resamples outputs"]
    variance: Float[np.ndarray, "resamples outputs"]
    """Of the targets; NaN where there is one value alone."""


def errors_of(targets: np.ndarray, values: np.ndarray, weights: Weights | None = None) -> Errors:
    """Those of numbers (images, outputs)."""
    targets, values = targets.astype(np.float64), values.astype(np.float64)
    weights = np.ones((1, len(targets))) if weights is None else weights
    total = weights.sum(axis=1, keepdims=True)
    errors, centred = values - targets, targets - targets.mean(axis=0)
    spread = weights @ centred**2 / total
    variance = spread - (weights @ centred / total) ** 2
    # Of one value alone the difference is what rounding leaves.
    variance = np.where(variance > 1e-12 * spread, variance, np.nan)
    return Errors(weights @ errors**2 / total, weights @ np.abs(errors) / total, variance)


METRICS = (
    Metric("r2", "R2", function=lambda errors: 1 - errors.square / errors.variance, interval=True, of_batch="r2"),
    Metric("rmse", "RMSE", lower_is_better=True, function=lambda errors: np.sqrt(errors.square), interval=True),
    Metric("mae", "MAE", lower_is_better=True, function=lambda errors: errors.absolute, interval=True),
    LOSS,
)


def value_metrics(targets: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """The metrics, the mean over the outputs."""
    return {name: mean_of_defined(each) for name, each in computed(METRICS, errors_of(targets, values)).items()}


@dataclasses.dataclass(frozen=True)
class ValuePredictions(Predictions):
    """A model's predictions for images with numbers, in the units of the targets."""

    targets: Float[np.ndarray, "images outputs"]
    values: Float[np.ndarray, "images outputs"]
    loss: Float[np.ndarray, " images"]
    """Squared error of the standardised targets, the mean over the outputs."""
    images_per_second: float

    def metrics(self) -> dict[str, float]:
        found = with_intervals(value_metrics(self.targets, self.values), self.intervals())
        return {"images": len(self.targets)} | found | self._loss_and_rate()

    def intervals(self, *, mean: bool = True) -> dict[str, tuple]:
        """The 95% intervals: of the means over the outputs, or of each output."""
        drawn = resamples(*self.targets.shape)
        return intervals(METRICS, (errors_of(self.targets, self.values, weights) for weights in drawn), mean=mean)

    def per_output(self, names: Sequence[str]) -> list[dict]:
        metrics, ends = computed(METRICS, errors_of(self.targets, self.values)), self.intervals(mean=False)
        rows = []
        for output, name in enumerate(names):
            own = {metric: float(each[0, output]) for metric, each in metrics.items()}
            of_output = {metric: (low[output], high[output]) for metric, (low, high) in ends.items()}
            rows.append({"target": name, "images": len(self.targets)} | with_intervals(own, of_output))
        return rows

    def rows(self, names: Sequence[str]) -> list[dict]:
        return [
            {name: float(target) for name, target in zip(names, targets, strict=True)}
            | {f"pred_{name}": float(value) for name, value in zip(names, values, strict=True)}
            for targets, values in zip(self.targets, self.values, strict=True)
        ]

    def confusion(self, names: Sequence[str]) -> Scatter:
        """Each prediction over its target."""
        found = computed(METRICS, errors_of(self.targets, self.values))
        each = zip(found["r2"][0], found["mae"][0], strict=True)
        return Scatter(self.targets, self.values, [f"R2 {r2:.4f}, MAE {mae:.4g}" for r2, mae in each])

    def mistakes(self, names: Sequence[str], count: int) -> Mistakes:
        """The greatest errors, each in standard deviations of its target."""
        spread = self.targets.std(axis=0)
        errors = np.abs(self.values - self.targets) / np.where(spread > 0, spread, 1)
        worst = np.argsort(-errors.max(axis=1), kind="stable")[:count]
        captions = []
        for index in worst:
            output = int(errors[index].argmax())
            value, target = self.values[index, output], self.targets[index, output]
            captions.append(f"{short(names[output])} {value:.4g}\nis {target:.4g}")
        title = f"{len(errors):,} images; those of the greatest error, in standard deviations of the target"
        return Mistakes(worst, captions, title)


class Regression(task.Task):
    """Labels are numbers, float32 (images, outputs)."""

    name = "regression"
    noun = "targets"
    metrics = METRICS
    losses = ("squared_error",)
    output_fields = ("target_mean", "target_std")
    has_probabilities = False
    label_columns = ("target", "targets", "value", "label")
    needs = "a number for each target of each image"
    wanted = "finite numbers"
    pipeline = None  # the hub has none of regressions
    tag = "image-regression"
    problem_type = "regression"

    def nothing_to_learn(self, labels: np.ndarray, names: Sequence[str]) -> str | None:
        for output in np.flatnonzero(np.ptp(labels, axis=0) == 0):
            return f"the target {names[output]!r} is {labels[0, output]:g} for all {len(labels)} training images"
        return None

    def usual_columns(self, names: Sequence[str], labels: Any) -> list[str]:
        return list(names)

    def labels_of_columns(self, names: Sequence[str], labels: Any) -> tuple:
        return labels.numbers(names)

    def notes(self, names: Sequence[str], moving: Mapping[str, Any]) -> list[str]:
        named = " and ".join(f"{name} {value}" for name, value in moving.items() if value)
        note = f"{named} move what an image shows, and not its targets: switch off what does not suit them"
        return [note] if named else []

    def statistics(self, labels: Callable[[], np.ndarray]) -> dict[str, tuple[float, ...]]:
        values = np.asarray(labels(), np.float64)
        return {"target_mean": tuple(values.mean(axis=0).tolist()), "target_std": tuple(values.std(axis=0).tolist())}

    def standardised(self, labels: Any, outputs: Outputs) -> Any:
        if outputs.target_mean is None:
            return labels
        return (labels - np.array(outputs.target_mean, np.float32)) / np.array(outputs.target_std, np.float32)

    def soft_targets(self, labels: "jax.Array", outputs: int, smoothing: float) -> "jax.Array":
        """The numbers as they are, for there is nothing to spread over."""
        return labels

    def measure(self, logits: "jax.Array", targets: "jax.Array") -> dict[str, "jax.Array"]:
        """R2 of the standardised targets."""
        return {"r2": 1 - ((logits.astype("float32") - targets) ** 2).mean()}

    def scores_of(self, logits: np.ndarray, labels: np.ndarray, outputs: Outputs) -> dict[str, float]:
        errors = logits - np.asarray(self.standardised(labels, outputs))
        return value_metrics(labels, in_units(logits, outputs)) | {"loss": np.square(errors).mean()}

    def predictions(self, arrays: Sequence[np.ndarray], outputs: Outputs, chosen: Any, rate: float) -> ValuePredictions:
        labels, logits = arrays
        given = (outputs.target_mean, outputs.target_std)
        mean, std = (None if each is None else tuple(np.asarray(each)[chosen]) for each in given)
        values = in_units(logits, dataclasses.replace(outputs, target_mean=mean, target_std=std))
        errors = (values - labels) / (1.0 if std is None else np.array(std))
        return ValuePredictions(labels.astype(np.float64), values, np.square(errors).mean(axis=1), rate)

    def activated(self, logits: "jax.Array") -> "jax.Array":
        return logits.astype("float32")

    def result(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> dict[str, Any]:
        values = in_units(scores, outputs)
        return {"pred_values": {class_name(index, names): float(value) for index, value in enumerate(values)}}

    def answer(self, result: dict[str, Any], names: Sequence[str] | None, count: int) -> Answer:
        rows = [{"target": name, "value": value} for name, value in result["pred_values"].items()]
        return Answer(result, rows, result["pred_values"])

    def shown(self, result: dict[str, Any], names: Sequence[str] | None) -> str:
        """The values, one a line."""
        return "\n".join(f"{name}: {value:.6g}" for name, value in result["pred_values"].items())

    def reasons(self, scores: np.ndarray, outputs: Outputs, names: Sequence[str] | None) -> tuple[list[int], list[str]]:
        values = self.result(scores, outputs, names)["pred_values"]
        return list(range(len(values))), [f"{name}: {value:.4g}" for name, value in values.items()]

    def caption(self, label: np.ndarray, target: np.ndarray, names: Sequence[str]) -> str:
        return "\n".join(
            ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values, strict=True))
            for values in (label, target)
        )

    def meaning(self, outputs: Outputs) -> list[str]:
        given = (outputs.target_mean or (0,), outputs.target_std or (1,))
        mean, std = (", ".join(f"{value:g}" for value in each) for each in given)
        return [
            f"The outputs are standardised targets: in their own units they are output * ({std}) + ({mean}), as "
            "tnt_jax gives them."
        ]


def in_units(logits: ArrayLike, outputs: Outputs) -> Float[np.ndarray, "*images outputs"]:
    """The numbers of a network of standardised targets, (..., outputs), in the units of the targets, in float64."""
    values = np.asarray(logits, np.float64)
    if outputs.target_mean is None:
        return values
    return values * np.array(outputs.target_std, np.float64) + np.array(outputs.target_mean, np.float64)
