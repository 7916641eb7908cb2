"""A training step: what it draws for an image, the dtypes of what it keeps, and the average of its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_runs import tiny_run

from tnt_jax.config import OptimizerConfig
from tnt_jax.models.variants import build_model, complete
from tnt_jax.training.optimizer import make_optimizer
from tnt_jax.training.step import init_state, make_train_step

BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (32, 16, 16, 1), np.uint8),
    "label": np.arange(32, dtype=np.int32) % 10,
}


def steps(count=1, model=(), batch=BATCH, **changes):
    """The states before and after each of so many steps of a tiny run on one batch, and their metrics."""
    config = tiny_run("unused", **changes)
    config = complete(dataclasses.replace(config, model=dataclasses.replace(config.model, **dict(model))), 10)
    graphdef, params = nnx.split(build_model(config.model, 0))
    params = nnx.to_pure_dict(params)
    optimizer = make_optimizer(config.optimizer, lambda step: config.optimizer.learning_rate)
    step = jax.jit(make_train_step(graphdef, params, optimizer, lambda step: 0.0, config))
    states, metrics = [init_state(params, optimizer)], []
    for _ in range(count):
        state, measured = step(states[-1], batch)
        states.append(state)
        metrics.append({name: float(value) for name, value in measured.items()})
    return states, metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [{"drop_path_rate": 0.3, "depth": 2}, pytest.param({"drop_rate": 0.2}, marks=pytest.mark.nightly)]
)
def test_a_step_in_parts_is_the_step_with_dropout_and_stochastic_depth_too(model):
    (_, whole), (metrics,) = steps(model=model)
    (_, parts), (metrics_of_parts,) = steps(model=model, accumulation_steps=4)
    for name in ("loss", "grad_norm"):
        assert metrics_of_parts[name] == pytest.approx(metrics[name], rel=1e-5), name
    for ours, theirs in zip(jax.tree.leaves(parts.opt_state), jax.tree.leaves(whole.opt_state), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max() + 1e-12)
    _, (undropped,) = steps(model=model | {"drop_path_rate": 0.0, "drop_rate": 0.0})
    assert metrics["loss"] != pytest.approx(undropped["loss"], rel=1e-5)


@pytest.mark.slow
def test_with_a_key_for_each_image_none_depends_on_the_others():
    config = complete(tiny_run("unused"), 10)
    config = dataclasses.replace(config.model, drop_path_rate=0.5, drop_rate=0.3, depth=2)
    model, images = build_model(config, 0), np.random.default_rng(0).normal(size=(6, 16, 16, 1)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 6)
    call = nnx.jit(lambda images, keys: model(images, keys))
    whole = call(images, keys)
    chosen = np.array([5, 2])
    np.testing.assert_allclose(call(images[chosen], keys[chosen]), whole[chosen], atol=1e-5)
    assert not np.allclose(call(images, keys[::-1]), whole, atol=1e-3)


@pytest.mark.slow
def test_each_image_of_a_batch_draws_for_itself():
    """What is the same 32 times has another mean loss than once; without a draw it has the same."""
    batches = [{name: np.repeat(value[:1], count, axis=0) for name, value in BATCH.items()} for count in (1, 32)]
    for rate in (0.0, 0.3):
        model = {"drop_rate": rate, "drop_path_rate": 0.0}
        once, often = (steps(model=model, batch=batch)[1][0]["loss"] for batch in batches)
        assert (often == pytest.approx(once, rel=1e-5)) == (rate == 0)


@pytest.mark.slow
def test_what_a_run_keeps_of_bfloat16_parameters_is_float32_and_falls_and_moves_as_float32_does():
    (first, *_, last), _ = steps(5, model={"param_dtype": "bfloat16"})
    kept = {leaf.dtype for leaf in jax.tree.leaves((last.params, last.ema, last.opt_state)) if leaf.ndim}
    assert kept == {jnp.dtype("float32")}
    # At a rate at which no weight of bfloat16 would move.
    optimizer = OptimizerConfig(learning_rate=1e-6, min_learning_rate=0, warmup_epochs=0, weight_decay=0.0)
    (first, *_, last), _ = steps(20, model={"param_dtype": "bfloat16"}, optimizer=optimizer)
    moved = last.params["head"]["kernel"] - first.params["head"]["kernel"]
    assert np.abs(moved).mean() == pytest.approx(20e-6, rel=0.5)
    squares = next(each.nu for each in jax.tree.leaves(last.opt_state, is_leaf=is_adam) if is_adam(each))
    assert jax.tree.structure(squares) == jax.tree.structure(last.params)


def is_adam(state) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


def test_the_average_of_weights_is_warmed_up_from_the_first_step_on():
    states, _ = steps(3)
    expected = np.asarray(states[0].params["head"]["kernel"])
    for update, state in enumerate(states[1:], 1):
        decay = (1 + update) / (10 + update)
        expected = decay * expected + (1 - decay) * np.asarray(state.params["head"]["kernel"])
        np.testing.assert_allclose(state.ema["head"]["kernel"], expected, atol=1e-6)
