"""Losses are those of PyTorch and of optax; weights are those of scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from tnt_jax.config import DataConfig, InputError, LossConfig, TrainConfig, check
from tnt_jax.models.variants import complete
from tnt_jax.tasks.losses import Objective
from tnt_jax.tasks.table import TASKS
from tnt_jax.tasks.task import Outputs
from tnt_jax.training.objective import objective_of

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(12, 5)).astype(np.float32) * 3
SOFT = RNG.dirichlet(np.ones(5), 12).astype(np.float32)
MANY = (RNG.random((12, 5)) < 0.4).astype(np.float32)
WEIGHTS = np.array([0.5, 2.0, 1.0, 3.0, 0.0])


def of_task(task, **weighing):
    return Objective(TASKS[task], Outputs(task), **weighing)


def of_torch(loss, targets, **options):
    weights = {name: torch.tensor(value, dtype=torch.float32) for name, value in options.items()}
    return float(loss(torch.tensor(LOGITS), torch.tensor(targets), **weights))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_one_class_is_torchs_cross_entropy_of_probabilities(weights):
    options = {} if weights is None else {"weight": weights}
    expected = of_torch(functional.cross_entropy, SOFT, **options)
    assert float(of_task("single_label", class_weights=weights).loss(LOGITS, SOFT)) == pytest.approx(expected, 1e-5)


def test_a_loss_is_chosen_by_its_name():
    expected = of_torch(functional.binary_cross_entropy_with_logits, SOFT)
    config = complete(TrainConfig(loss=LossConfig("binary_cross_entropy")), 5)
    assert float(objective_of(config).loss(LOGITS, SOFT)) == pytest.approx(expected, 1e-5)
    with pytest.raises(InputError, match=r"must be cross_entropy or binary_cross_entropy for data\.task single_label"):
        check(TrainConfig(loss=LossConfig("squared_error")))


@pytest.mark.parametrize("targets", [MANY, SOFT])
def test_labels_are_torchs_binary_cross_entropy_with_positive_and_class_weights(targets):
    expected = of_torch(functional.binary_cross_entropy_with_logits, targets, pos_weight=WEIGHTS + 1, weight=WEIGHTS)
    ours = of_task("multi_label", class_weights=WEIGHTS, positive_weights=WEIGHTS + 1).loss(LOGITS, targets)
    assert float(ours) == pytest.approx(expected, 1e-5)


def test_focal_losses_are_those_of_their_papers_and_cross_entropy_at_gamma_0():
    # torchvision's sigmoid_focal_loss without alpha: bce * (1 - p_t) ** gamma
    p = torch.sigmoid(torch.tensor(LOGITS)).numpy()
    right = np.where(MANY > 0, p, 1 - p)
    ours = of_task("multi_label", focal_gamma=2.0).loss(LOGITS, MANY)
    assert float(ours) == pytest.approx((-np.log(right) * (1 - right) ** 2).mean(), 1e-4)
    # Lin et al., equation 4, for a softmax
    labels = SOFT.argmax(1)
    p = torch.softmax(torch.tensor(LOGITS), 1).numpy()[np.arange(12), labels]
    ours = of_task("single_label", focal_gamma=1.5).loss(LOGITS, np.eye(5, dtype=np.float32)[labels])
    assert float(ours) == pytest.approx((-np.log(p) * (1 - p) ** 1.5).mean(), 1e-4)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0, 2.0])
def test_gradients_are_finite_where_the_answer_is_certain(gamma):
    for logits in ([[200.0, -200.0]], [[30.0, -30.0]], [[20.0, 0.0]], [[5.0, 5.0]]):
        for task in ("single_label", "multi_label"):
            objective = of_task(task, focal_gamma=gamma)
            for targets in ([[1.0, 0.0]], [[0.0, 1.0]]):
                assert np.isfinite(jax.grad(objective.loss)(jnp.array(logits), jnp.array(targets))).all()
    alone = jax.value_and_grad(of_task("single_label", focal_gamma=gamma).loss)(jnp.ones((1, 1)), jnp.ones((1, 1)))
    assert alone == (0, 0)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradients_of_focal_loss_are_pytorchs_in_float64(gamma):
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(logits, 1)
    (-torch.tensor(SOFT) * (1 - p) ** gamma * p.log()).sum(1).mean().backward()
    ours = jax.grad(of_task("single_label", focal_gamma=gamma).loss)(jnp.asarray(LOGITS), jnp.asarray(SOFT))
    np.testing.assert_allclose(ours, logits.grad, rtol=1e-4, atol=1e-7)


def test_targets_of_a_regression_are_standardised_and_their_scores_are_in_units():
    labels = np.array([[1990.0, 0.1], [2010.0, 0.3], [2000.0, 0.2]], np.float32)
    config = complete(TrainConfig(data=DataConfig("any", task="regression")), 2)
    objective = objective_of(config, lambda: labels)
    standard = np.asarray(objective.task.standardised(jnp.asarray(labels), objective.outputs))
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(standard.std(0), 1, rtol=1e-4)
    assert float(objective.loss(jnp.zeros((3, 2)), standard)) == pytest.approx(1, rel=1e-4)
    batch = {"outputs": standard + np.array([0.5, 0.0]), "labels": labels, "mask": np.array([True, True, True])}
    padding = {"outputs": np.full((1, 2), 9.0), "labels": np.zeros((1, 2)), "mask": np.array([False])}
    scores = objective.task.scores([batch, padding], objective.outputs)
    assert scores["count"] == 3
    assert scores["mae"] == pytest.approx(0.5 * labels[:, 0].std() / 2, rel=1e-3)


def test_balanced_weights_are_scikit_learns_and_those_of_labels_without_over_with():
    labels = np.array([0] * 50 + [1] * 5 + [3] * 2)
    config = complete(TrainConfig(loss=LossConfig(class_weights="balanced")), 4)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(objective_of(config, lambda: labels).class_weights[[0, 1, 3]], expected)
    data, loss = DataConfig("any", task="multi_label"), LossConfig(positive_weights="balanced")
    many = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]], np.float32)
    objective = objective_of(complete(TrainConfig(data=data, loss=loss), 3), lambda: many)
    # A weight of 0 for what all have would teach that it is never there.
    np.testing.assert_allclose(objective.positive_weights, [3 / 2, 1, 1])


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("regression", {"loss": LossConfig(class_weights="balanced")}, "class_weights is 'balanced', which only"),
        ("single_label", {"loss": LossConfig(positive_weights=(1.0, 2.0))}, "which only multi_label can have"),
        ("regression", {"loss": LossConfig(focal_gamma=2.0)}, "loss.focal_gamma is 2.0, .* it must be 0"),
        ("multi_label", {"best_metric": "top1"}, "best_metric is 'top1', and must be one of map, roc_auc"),
        (
            "single_label",
            {"loss": LossConfig(class_weights=(1.0, -1.0))},
            "class_weights is .*, and must be at least 0",
        ),
        ("single_label", {"loss": LossConfig(class_weights="equal")}, "class_weights is 'equal', and must be one of"),
    ],
)
def test_what_a_task_does_not_have_is_refused(task, changes, message):
    with pytest.raises(InputError, match=message):
        check(TrainConfig(data=DataConfig("any", task=task), **changes))
    with pytest.raises(InputError, match="is 'sqrt', which only single_label and multi_label can have"):
        check(TrainConfig(data=DataConfig("any", task="regression", sampling="sqrt")))


def test_as_many_weights_as_outputs():
    config = complete(TrainConfig(loss=LossConfig(class_weights=(1.0, 2.0))), 10)
    with pytest.raises(InputError, match=r"loss.class_weights has 2 numbers, and digits has 10 outputs"):
        objective_of(config)


def test_scores_of_classes_count_the_images_of_the_mask_alone():
    task = TASKS["single_label"]
    logits = jnp.array([[3.0, 1, 0], [0, 2, 1], [0, 1, 2], [9, 0, 0]])
    batch = task.evaluated(logits, jnp.array([0, 1, 1, 2]), jnp.array([True, True, True, False]))
    scores = task.scores([jax.device_get(batch)] * 2, Outputs(task.name))
    assert (scores["count"], scores["top1"]) == (6, pytest.approx(2 / 3))
    assert scores["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    expected = functional.cross_entropy(torch.tensor(np.asarray(logits[:3])), torch.tensor([0, 1, 1]))
    assert scores["loss"] == pytest.approx(float(expected), 1e-6)


def test_top5_is_scikit_learns():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 12)).astype(np.float32), rng.integers(0, 12, 200)
    task = TASKS["single_label"]
    batch = task.evaluated(jnp.asarray(logits), jnp.asarray(labels), jnp.ones(200, bool))
    scores = task.scores([jax.device_get(batch)], Outputs(task.name))
    assert scores["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))


@pytest.mark.parametrize(
    ("task", "labels", "undefined"),
    [("regression", [[1.0, 2.0]], {"r2"}), ("multi_label", [[1.0, 1.0], [1.0, 1.0]], {"map", "roc_auc"})],
)
def test_a_metric_that_is_undefined_is_none_and_the_loss_shows_what_is_not_finite(task, labels, undefined):
    labels = np.array(labels, np.float32)
    batch = {"outputs": np.ones_like(labels), "labels": labels, "mask": np.ones(len(labels), bool)}
    scores = TASKS[task].scores([batch], Outputs(task))
    assert {name for name, value in scores.items() if value is None} == undefined
    assert np.isfinite([value for value in scores.values() if value is not None]).all()
    broken = TASKS[task].scores([batch | {"outputs": batch["outputs"] * np.inf}], Outputs(task))
    assert np.isnan(broken["loss"])


def test_a_class_whose_logit_is_not_finite_is_seen_also_where_it_does_not_win():
    outputs = jnp.array([[1.0, -jnp.inf], [0.0, 2.0]])
    batch = TASKS["single_label"].evaluated(outputs, jnp.array([0, 1]), jnp.array([True, True]))
    assert np.isnan(batch["loss"])
