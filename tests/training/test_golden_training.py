"""Forty steps of training are those of the published model under PyTorch's AdamW in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from flax import nnx

from tnt_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from tnt_jax.models.saving import model_from_parameters, model_parameters
from tnt_jax.models.variants import resolve
from tnt_jax.torch_weights.layouts import to_layout
from tnt_jax.torch_weights.read import to_parameters
from tnt_jax.training.optimizer import make_optimizer
from tnt_jax.training.step import init_state, make_train_step


def published_batches(manifest):
    """The manifest's `data_rule`, as NHWC."""
    rng = np.random.default_rng([manifest["seed"], 11])
    images = rng.standard_normal((manifest["steps"], manifest["batch"], 3, 32, 32)).astype(np.float32)
    labels = rng.integers(0, 10, (manifest["steps"], manifest["batch"]))
    images += (labels[..., None, None, None] - 4.5).astype(np.float32) * 0.15
    return images.transpose(0, 1, 3, 4, 2), labels


@pytest.fixture(scope="module")
def run():
    """The record, the metrics of our steps, and our final parameters and averages in huawei's layout."""
    record, manifest = published.record("huawei_training_40_steps")
    config = TrainConfig(
        model=resolve(
            ModelConfig(
                name="tnt_s_patch16_224",
                image_size=32,
                patch_size=8,
                word_stride=2,
                depth=3,
                inner_dim=12,
                inner_heads=2,
                outer_dim=48,
                outer_heads=3,
                num_classes=10,
                drop_path_rate=0.0,
            )
        ),
        # The record feeds its images as they are: this std undoes the division by 255.
        data=DataConfig.plain("digits", label_smoothing=manifest["label_smoothing"], mean=0.0, std=1 / 255),
        optimizer=OptimizerConfig(weight_decay=0.05, ema_decay=manifest["ema_decay"], ema_warmup=False),
    )
    tensors = {
        name: tensor * np.float32(0.3 if tensor.ndim > 1 else 1)
        for name, tensor in published.state_dict(manifest).items()
    }
    graphdef, params = nnx.split(model_from_parameters(config.model, to_parameters(tensors, "huawei", config.model)))

    def schedule(step):
        return jnp.asarray(record["lr"], jnp.float32)[step]

    optimizer = make_optimizer(config.optimizer, schedule)
    state = init_state(nnx.to_pure_dict(params), optimizer)
    train_step = jax.jit(make_train_step(graphdef, optimizer, schedule, config))
    metrics = []
    for images, labels in zip(*published_batches(manifest), strict=True):
        state, values = train_step(state, {"image": images, "label": labels.astype(np.int32)})
        metrics.append(values)

    def in_layout(params):
        return to_layout(
            {path: np.asarray(value) for path, value in model_parameters(nnx.merge(graphdef, params)).items()}, "huawei"
        )

    return record, metrics, {"final": in_layout(state.params), "ema": in_layout(state.ema)}


def test_the_loss_of_every_step_is_the_published_one(run):
    record, metrics, _ = run
    np.testing.assert_allclose([values["loss"] for values in metrics], record["loss"], rtol=1e-5)
    np.testing.assert_allclose([values["learning_rate"] for values in metrics], record["lr"], rtol=1e-6)


def test_the_gradient_of_every_step_has_the_published_norm(run):
    record, metrics, _ = run
    np.testing.assert_allclose([values["grad_norm"] for values in metrics], record["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["final", "ema"])
def test_parameters_and_their_average_end_where_the_published_ones_do(run, kind):
    record, _, ours = run
    names = [name.removeprefix(f"{kind}/") for name in record if name.startswith(f"{kind}/")]
    assert {*names, "outer_tokens"} == {*ours[kind], "outer_tokens"}
    for name in names:
        expected = record[f"{kind}/{name}"]
        assert np.abs(ours[kind][name] - expected).max() < 1e-4 * np.abs(expected).max(), name
