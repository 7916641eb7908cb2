"""Batch norm in training: PyTorch's numbers, whatever the devices, the parts of a step, or rematerialisation."""

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

from tnt_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from tnt_jax.models.layers import BatchNorm, InitialRngs
from tnt_jax.models.variants import build_model, resolve
from tnt_jax.training.optimizer import make_optimizer
from tnt_jax.training.step import init_state, make_train_step

SMALL = ModelConfig(
    "ptnt_ti_patch16_192",
    image_size=32,
    in_channels=1,
    num_classes=3,
    depth=(1, 1, 1, 1),
    inner_dim=(2, 2, 2, 2),
    inner_heads=(1, 1, 1, 1),
    outer_dim=(8, 8, 8, 8),
    outer_heads=(2, 2, 2, 2),
    drop_path_rate=0.0,
)


def test_batch_norm_is_that_of_pytorch_over_several_steps():
    rng = np.random.default_rng(0)
    ours = BatchNorm(5, config=resolve(SMALL), rngs=InitialRngs(0))
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
    model = {"remat": changes.pop("remat", False)}
    config = TrainConfig(
        model=resolve(ModelConfig(**{**SMALL.__dict__, **model})),
        data=DataConfig(label_smoothing=0.0, mean=0.0, std=1 / 255),
        optimizer=OptimizerConfig(ema_decay=0.5, ema_warmup=False, weight_decay=0.5),
        batch_size=8,
        **changes,
    )
    graphdef, params = nnx.split(build_model(config.model, 0))
    optimizer = make_optimizer(config.optimizer, lambda step: 1e-3)
    state = init_state(nnx.to_pure_dict(params), optimizer)
    step = jax.jit(make_train_step(graphdef, optimizer, lambda step: 1e-3, config))
    rng = np.random.default_rng(1)
    batches = rng.normal(size=(steps, 8, 32, 32, 1)).astype(np.float32)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for images in batches:
        batch = {"image": images, "label": np.arange(8, dtype=np.int32) % 3}
        state, _ = step(state, jax.device_put(batch, over_batch))
    flat = {name: _flat(tree) for name, tree in (("params", state.params), ("ema", state.ema))}
    return flat["params"], flat["ema"], batches


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(entry.key) for entry in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def one_device():
    return trained()


def test_a_step_moves_the_running_averages_as_pytorch_does_and_nothing_else_does(one_device):
    params, ema, batches = one_device
    conv = torch.nn.Conv2d(1, 4, 3, stride=2, padding=1)
    norm = torch.nn.BatchNorm2d(4)
    initial = build_model(SMALL, 0).stem.common.conv
    kernel = torch.tensor(np.array(initial.kernel[...]).transpose(3, 2, 0, 1))
    conv.load_state_dict({"weight": kernel, "bias": torch.zeros(4)})
    # The first step changes the convolution by 1e-3 at most, which moves a mean of ten times the deviation less.
    norm(conv(torch.tensor(batches[0].transpose(0, 3, 1, 2))))
    first = {"mean": norm.running_mean.numpy().copy(), "var": norm.running_var.numpy().copy()}
    params_of_first, ema_of_first, _ = trained(steps=1)
    for name, start in (("mean", 0), ("var", 1)):
        path = f"stem.common.norm.{name}"
        np.testing.assert_allclose(params_of_first[path], first[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ema_of_first[path], (start + first[name]) / 2, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ema[path], (ema_of_first[path] + params[path]) / 2, rtol=1e-5)


def test_remat_changes_nothing(one_device):
    for path, value in trained(remat=True)[0].items():
        np.testing.assert_allclose(value, one_device[0][path], atol=2e-4, err_msg=path)


def test_in_parts_of_a_step_the_running_averages_go_from_part_to_part():
    params, _, (images,) = trained(steps=1, accumulation_steps=2)
    model = build_model(SMALL, 0)
    for part in (images[0::2], images[1::2]):
        model.stem(jnp.asarray(part), training=True)
    for name in ("mean", "var"):
        expected = getattr(model.stem.sentences3.norm, name)[...]
        np.testing.assert_allclose(params[f"stem.sentences3.norm.{name}"], expected, rtol=1e-4, atol=1e-6)


ON_DEVICES = """
import json, sys
import jax
sys.path[:0] = ["tests", "tests/training"]
from test_batch_norm import trained
assert jax.device_count() == 4
params, ema, _ = trained(devices=4)
print(json.dumps({"params": {k: v.tolist() for k, v in params.items()}, "ema": {k: v.tolist() for k, v in ema.items()}}))
"""


def test_statistics_are_those_of_the_global_batch_on_four_devices(one_device):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ON_DEVICES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    four = json.loads(done.stdout.splitlines()[-1])
    for ours, one in ((four["params"], one_device[0]), (four["ema"], one_device[1])):
        assert ours.keys() == one.keys()
        for path in ours:
            if path.endswith((".norm.mean", ".norm.var")):
                np.testing.assert_allclose(ours[path], one[path], rtol=1e-3, atol=1e-5, err_msg=path)
