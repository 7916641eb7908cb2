"""Forty steps of training are those of the published model under PyTorch's AdamW in float64, on any devices."""

import json
import os
import subprocess
import sys

import numpy as np
import published
import pytest
from commands import ROOT
from flax import nnx
from golden_training import VARIANTS, forty_steps

from tnt_jax.storage.folder import model_parameters
from tnt_jax.storage.torch.layouts import to_layout


@pytest.fixture(scope="module")
def run():
    """The record, the metrics of our steps, and our final parameters and averages in huawei's layout."""
    record, manifest = published.record("huawei_training_40_steps")
    graphdef, state, metrics = forty_steps(record, manifest)

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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "8" in name else pytest.mark.nightly) for name in VARIANTS]
)
def test_the_curve_is_the_same_on_any_devices_sharded_in_parts_and_rematerialised(name):
    record, _ = published.record("huawei_training_40_steps")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/golden_training.py", name], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    np.testing.assert_allclose(result["loss"], record["loss"], rtol=1e-5)
    np.testing.assert_allclose(result["grad_norm"], record["grad_norm"], rtol=1e-4)
    assert result["shards"] == VARIANTS[name].get("fsdp", 1)
