"""Learning rate, decay and averaging, against PyTorch's optimizer and the published schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import tnt_jax
from tnt_jax.config import OptimizerConfig
from tnt_jax.models.variants import abstract_model, model_config
from tnt_jax.training.optimizer import (
    decay_mask,
    ema_decay,
    layer_scales,
    learning_rate_schedule,
    make_optimizer,
)


def test_schedule_is_a_line_up_that_replaces_the_start_of_a_cosine_over_the_whole_run():
    config = OptimizerConfig(learning_rate=1e-3, warmup_epochs=5, warmup_learning_rate=1e-6, min_learning_rate=1e-5)
    rates = learning_rate_schedule(config, steps_per_epoch=10, epochs=300)(np.arange(3100))
    assert rates[0] == pytest.approx(1e-6)
    assert rates[25] == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-3)
    assert rates[50] == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * 5 / 300)), rel=1e-4)
    assert (np.diff(rates[50:3000]) < 0).all()
    assert rates[3000:] == pytest.approx(1e-5)


def test_published_schedule_holds_its_rate_for_an_epoch():
    config = OptimizerConfig(change_every="epoch")
    rates = learning_rate_schedule(config, steps_per_epoch=10, epochs=300)(np.arange(3100)).reshape(310, 10)
    assert (rates == rates[:, :1]).all()
    # timm 0.3: lr(t) = 1e-6 + t (1e-3 - 1e-6) / 5 for the first five epochs, then the cosine of t / 300.
    assert rates[:5, 0] == pytest.approx([1e-6 + t * (1e-3 - 1e-6) / 5 for t in range(5)], rel=1e-5)
    assert rates[150, 0] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-5)


def test_layers_near_the_words_learn_more_slowly():
    sizes = {"image_size": 32, "patch_size": 16, "depth": 2, "num_classes": 3}
    params = nnx.to_pure_dict(nnx.state(tnt_jax.create_model("tnt_ti_patch16_224", **sizes)))
    scales = layer_scales(params, 0.5)
    assert scales["head"]["kernel"] == scales["norm"]["scale"] == 1
    assert scales["blocks"][1]["outer"]["attn"]["qkv"]["kernel"] == 0.5
    assert scales["blocks"][0]["inner"]["norm1"]["bias"] == 0.25
    assert scales["sentence_positions"] == scales["word_embedding"]["conv"]["kernel"] == 0.125
    pyramid = nnx.to_pure_dict(nnx.state(abstract_model(model_config("ptnt_ti_patch16_192", depth=(1, 2, 1, 1)))))
    scales_of_pyramid = layer_scales(pyramid, 0.5)
    assert scales_of_pyramid["head"]["kernel"] == 1
    stages, between = scales_of_pyramid["stages"], scales_of_pyramid["aggregations"]
    assert [stages[i]["position_bias"] for i in range(4)] == [0.5**5, 0.5**4, 0.5**2, 0.5]
    assert stages[1]["blocks"][1]["outer"]["norm1"]["bias"] == between[1]["word_norm"]["bias"] == 0.5**3
    assert scales_of_pyramid["stem"]["common"]["conv"]["kernel"] == 0.5**6
    config = OptimizerConfig(layer_decay=0.5, weight_decay=0.0)
    optimizer = make_optimizer(config, lambda step: 1.0)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    jax.tree.map(lambda update, scale: np.testing.assert_allclose(update, -scale, rtol=1e-5), updates, scales)


def test_steps_are_those_of_pytorchs_adamw():
    rng = np.random.default_rng(0)
    start = {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}
    gradients = [{name: rng.standard_normal(value.shape) for name, value in start.items()} for _ in range(20)]
    config = OptimizerConfig(learning_rate=3e-2, warmup_epochs=1, weight_decay=0.1, beta2=0.98)
    schedule = learning_rate_schedule(config, steps_per_epoch=5, epochs=4)

    tensors = {name: torch.tensor(value, dtype=torch.float32, requires_grad=True) for name, value in start.items()}
    groups = [{"params": [tensors["kernel"]], "weight_decay": 0.1}, {"params": [tensors["bias"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-8)
    optimizer = make_optimizer(config, schedule)
    params = jax.tree.map(jnp.float32, start)
    state = optimizer.init(params)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
        for group in reference.param_groups:
            group["lr"] = float(schedule(step))
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name], dtype=torch.float32)
        reference.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_only_matrices_decay():
    sizes = {"image_size": 32, "patch_size": 16, "depth": 1, "num_classes": 3}
    params = nnx.to_pure_dict(nnx.state(tnt_jax.create_model("tnt_ti_patch16_224", **sizes)))
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    decayed = {jax.tree_util.keystr(path, simple=True, separator=".") for path, decays in mask if decays}
    assert decayed == {
        "blocks.0.inner.attn.proj.kernel",
        "blocks.0.inner.attn.qkv.kernel",
        "blocks.0.inner.mlp.fc1.kernel",
        "blocks.0.inner.mlp.fc2.kernel",
        "blocks.0.outer.attn.proj.kernel",
        "blocks.0.outer.attn.qkv.kernel",
        "blocks.0.outer.mlp.fc1.kernel",
        "blocks.0.outer.mlp.fc2.kernel",
        "blocks.0.words_to_sentence.proj.kernel",
        "head.kernel",
        "sentence_embedding.proj.kernel",
        "word_embedding.conv.kernel",
    }
    # huawei's no_weight_decay names the positions of a PyramidTNT alone: the bias of pairs decays there.
    pyramid = decay_mask(nnx.to_pure_dict(nnx.state(abstract_model(model_config("ptnt_ti_patch16_192")))))
    assert all(stage["position_bias"] for stage in pyramid["stages"].values())
    assert not pyramid["sentence_positions"]


def test_average_of_a_short_run_follows_its_weights():
    config = OptimizerConfig(ema_decay=0.99996)
    decays = [float(ema_decay(config, jnp.int32(update))) for update in (1, 10, 1000, 10**7)]
    assert decays == pytest.approx([2 / 11, 11 / 20, 1001 / 1010, 0.99996])
    constant = OptimizerConfig(ema_decay=0.95, ema_warmup=False)
    assert float(ema_decay(constant, jnp.int32(1))) == pytest.approx(0.95)
