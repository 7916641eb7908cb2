"""Batch norm in training: PyTorch's numbers, whatever the devices, the parts of a step, or rematerialisation."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from commands import ROOT
from flax import nnx
from small_models import small_pyramid

from tnt_jax.config import DataConfig, OptimizerConfig, TrainConfig
from tnt_jax.models.layers import BatchNorm, Linear
from tnt_jax.models.stem import ConvNormRelu
from tnt_jax.models.variants import model_config
from tnt_jax.training.optimizer import make_optimizer
from tnt_jax.training.step import init_state, make_train_step

MODEL = model_config("ptnt_ti_patch16_192", image_size=32, in_channels=1, num_classes=3)


class Net(nnx.Module):
    """What a stem with batch norm needs of a network, compiled in a moment."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = ConvNormRelu(1, 4, 2, config=MODEL, rngs=rngs)
        self.head = Linear(4, 3, config=MODEL, rngs=rngs)

    def __call__(self, images, key):
        return self.head(self.stem(images, training=key is not None).mean(axis=(1, 2)))


def test_batch_norm_is_that_of_pytorch_over_several_steps():
    rng = np.random.default_rng(0)
    ours = BatchNorm(5, config=MODEL, rngs=nnx.Rngs(0))
    theirs = torch.nn.BatchNorm2d(5)
    for step in range(4):
        x = rng.normal(step, 1 + step, (2, 3, 2, 5)).astype(np.float32)
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours(jnp.asarray(x), training=True), expected, atol=2e-6)
        np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-5)
        np.testing.assert_allclose(ours.var[...], theirs.running_var, rtol=1e-5)
    theirs.eval()
    expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours(jnp.asarray(x), training=False), expected, atol=2e-6)


def trained(steps=2, devices=1, **changes):
    """Parameters and their average after a few steps, as flat dictionaries, and the images of every step."""
    state, step = state_and_step(Net(), **changes)
    batches = np.random.default_rng(1).normal(size=(steps, 8, 32, 32, 1)).astype(np.float32)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for images in batches:
        state, _ = jax.jit(step)(state, jax.device_put({"image": images, "label": LABELS}, over_batch))
    return _flat(state.params), _flat(state.ema), batches


def test_the_average_that_an_optimizer_makes_has_the_running_averages_of_the_steps():
    params, averaged, _ = trained(3, optimizer=OptimizerConfig("schedule_free"))
    moved = {name for name in params if (params[name] != averaged[name]).any()}
    running = {name for name in params if name.endswith(("mean", "var"))}
    assert running
    assert moved == set(params) - running


LABELS = np.arange(8, dtype=np.int32) % 3


def state_and_step(model, **changes):
    config = TrainConfig(
        model=MODEL,
        data=DataConfig.plain("digits", label_smoothing=0.0, mean=0.0, std=1.0),
        optimizer=OptimizerConfig(ema_decay=0.5, ema_warmup=False, weight_decay=0.5),
        batch_size=8,
    )
    config = dataclasses.replace(config, **changes)
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(config.optimizer, lambda step: 1e-3)
    params = nnx.to_pure_dict(params)
    return init_state(params, optimizer), make_train_step(graphdef, params, optimizer, lambda _: 1e-3, config)


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(entry.key) for entry in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def one_device():
    return trained()


def stem_of_pytorch(images):
    """Running mean and variance after PyTorch's stem has seen these images, one array after the other."""
    conv, norm = torch.nn.Conv2d(1, 4, 3, stride=2, padding=1), torch.nn.BatchNorm2d(4)
    kernel = np.array(Net().stem.conv.kernel[...]).transpose(3, 2, 0, 1)
    conv.load_state_dict({"weight": torch.tensor(kernel), "bias": torch.zeros(4)})
    for part in images:
        norm(conv(torch.tensor(part.transpose(0, 3, 1, 2))))
    return norm.running_mean.numpy(), norm.running_var.numpy()


def test_a_step_moves_the_running_averages_as_pytorch_does_and_they_are_averaged(one_device):
    (params, ema, (images,)), (later, later_ema, _) = trained(steps=1), one_device
    for name, start, expected in zip(("mean", "var"), (0, 1), stem_of_pytorch([images]), strict=True):
        path = f"stem.norm.{name}"
        np.testing.assert_allclose(params[path], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(ema[path], (start + expected) / 2, rtol=1e-5, atol=1e-7)
        assert np.abs(later[path] - params[path]).max() > 1e-4
        np.testing.assert_allclose(later_ema[path], (ema[path] + later[path]) / 2, rtol=1e-5)


def test_in_parts_of_a_step_the_running_averages_go_from_part_to_part():
    params, _, (images,) = trained(steps=1, accumulation_steps=2)
    for name, expected in zip(("mean", "var"), stem_of_pytorch([images[0::2], images[1::2]]), strict=True):
        np.testing.assert_allclose(params[f"stem.norm.{name}"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 2}])
def test_a_pyramid_that_is_rematerialised_keeps_its_running_averages(changes):
    model = small_pyramid(in_channels=1, remat="all")
    state, step = state_and_step(model, **changes)
    batch = {"image": np.zeros((8, 32, 32, 1), np.float32), "label": LABELS}
    new, _ = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, new.params) == jax.tree.map(jnp.shape, state.params)
    program = str(jax.make_jaxpr(step)(state, batch))
    assert program.count("name=checkpoint") + program.count("remat") >= 4


ON_DEVICES = """
import json, sys
import jax
sys.path[:0] = ["tests", "tests/training"]
from test_batch_norm import trained
assert jax.device_count() == 4
params, ema, _ = trained(steps=1, devices=4)
print(json.dumps([{path: value.tolist() for path, value in tree.items()} for tree in (params, ema)]))
"""


def test_statistics_are_those_of_the_global_batch_on_four_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ON_DEVICES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    four = json.loads(done.stdout.splitlines()[-1])
    for ours, one in zip(four, trained(steps=1)[:2], strict=True):
        assert ours.keys() == one.keys()
        for path in ours:
            # Batch norm subtracts a bias before it: its gradient is rounding, which AdamW makes large.
            if path != "stem.conv.bias":
                np.testing.assert_allclose(ours[path], one[path], rtol=1e-4, atol=1e-5, err_msg=path)
