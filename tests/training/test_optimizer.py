"""Learning rate, decay and averaging, against PyTorch's optimizer and the published schedule."""

import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import schedulefree
import torch
from flax import nnx
from others import timm

import tnt_jax
from tnt_jax.config import InputError, OptimizerConfig, check_optimizer
from tnt_jax.models.variants import abstract_model, model_config
from tnt_jax.training.optimizer import (
    OPTIMIZERS,
    average_of_weights,
    decay_mask,
    ema_decay,
    layer_scales,
    learning_rate_schedule,
    make_optimizer,
    muon_dimensions,
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


def reference(name, decayed, other):
    """Another implementation of an optimizer, with beta 0.9 and 0.98 and decay 0.1 of some tensors."""
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    both = {"lr": 1.0, "betas": (0.9, 0.98)}
    if name == "adamw":
        return torch.optim.AdamW(groups, **both)
    if name == "nadamw":
        # With this the momentum of PyTorch's is constant.
        return torch.optim.NAdam(groups, **both, momentum_decay=1e6, decoupled_weight_decay=True)
    if name == "lamb":
        return timm.optim.Lamb(groups, **both, eps=1e-8, max_grad_norm=None)
    if name == "lion":
        return timm.optim.Lion(groups, **both)
    if name == "schedule_free":
        return schedulefree.AdamWScheduleFree(groups, **both)
    assert name == "sgd"
    return timm.optim.SGDW(groups, lr=1.0, momentum=0.9)


STEPS = 20


def moved(config, start, gradients, schedule):
    """Parameters after some steps of ours, and the state of the optimizer."""
    optimizer = make_optimizer(config, schedule)
    params = jax.tree.map(jnp.float32, start)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.fixture
def problem():
    """Weights and the gradients of some steps."""
    rng = np.random.default_rng(0)
    start = {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}
    return start, [{name: rng.standard_normal(value.shape) for name, value in start.items()} for _ in range(STEPS)]


@pytest.mark.parametrize("name", ["adamw", "nadamw", "lamb", "lion", "sgd", "schedule_free"])
def test_steps_are_those_of_others(name, problem):
    start, gradients = problem
    betas = {} if name == "sgd" else {"beta2": 0.98}
    config = OptimizerConfig(name, learning_rate=3e-2, warmup_epochs=1, weight_decay=0.1, **betas)
    schedule = learning_rate_schedule(config, steps_per_epoch=5, epochs=4)
    if name == "schedule_free":  # whose weights of the average depend on how warm-up is written
        schedule = lambda step: 0.03 + 0.0 * step  # noqa: E731
    params, state = moved(config, start, gradients, schedule)
    tensors = {each: torch.tensor(value, dtype=torch.float32, requires_grad=True) for each, value in start.items()}
    other = reference(name, [tensors["kernel"]], [tensors["bias"]])
    if name == "schedule_free":
        other.train()
    for step, gradient in enumerate(gradients):
        for group in other.param_groups:
            group["lr"] = float(schedule(step))
        for each, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[each], dtype=torch.float32)
        other.step()
    for each, tensor in tensors.items():
        np.testing.assert_allclose(params[each], tensor.detach().numpy(), rtol=2e-5, atol=2e-6)
    if name == "schedule_free":
        other.eval()
        averaged = average_of_weights(config, jnp.int32(STEPS), {}, params, state, {})
        for each, tensor in tensors.items():
            np.testing.assert_allclose(averaged[each], tensor.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_muon_is_pytorchs_for_matrices_and_adamw_for_the_rest(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # in which PyTorch's orthogonalises
    rng = np.random.default_rng(0)
    start = {"blocks": {0: {"kernel": rng.standard_normal((8, 6)), "bias": rng.standard_normal(6)}}}
    gradients = [jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), start) for _ in range(30)]
    config = OptimizerConfig("muon", learning_rate=3e-2, weight_decay=0.1, beta1=0.5, epsilon=1e-7)
    ours = [moved(config, start, gradients[:steps], lambda step: 0.03)[0]["blocks"][0] for steps in (29, 30)]
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in start["blocks"][0].items()}
    muon = {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.5, "adjust_lr_fn": "match_rms_adamw"}
    adamw = {"lr": 0.03, "weight_decay": 0.0, "betas": (0.5, 0.999), "eps": 1e-7}
    others = torch.optim.Muon([tensors["kernel"]], **muon), torch.optim.AdamW([tensors["bias"]], **adamw)
    for gradient in gradients:
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient["blocks"][0][name], dtype=torch.float32)
        for each in others:
            each.step()
    np.testing.assert_allclose(ours[1]["bias"], tensors["bias"].numpy(), rtol=1e-5, atol=1e-6)
    # Optax corrects the bias of the first moments, which is over by the last step; decay differs with the weights.
    last, other = ours[1]["kernel"] - ours[0]["kernel"], (tensors["kernel"] - before["kernel"]).numpy()
    decay = 0.03 * 0.1 * (ours[0]["kernel"] - before["kernel"].numpy())
    np.testing.assert_allclose(last + decay, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variant", ["tnt_ti_patch16_224", "ptnt_ti_patch16_192"])
def test_muon_moves_the_matrices_of_the_blocks_and_convolutions_between_them(variant):
    params = nnx.to_pure_dict(nnx.state(abstract_model(model_config(variant))))
    axes = {
        re.sub(r"\d+", "N", jax.tree_util.keystr(path, simple=True, separator=".")): tuple(found)
        for path, found in jax.tree.leaves_with_path(
            muon_dimensions(params), is_leaf=lambda leaf: type(leaf) is not dict
        )
        if found is not None
    }
    names = {name.rsplit(".", 2)[-2] for name in axes}
    if variant.startswith("tnt"):
        assert names == {"qkv", "proj", "fcN"}
    else:
        assert names == {"qkv", "proj", "fcN", "linear", "word_conv", "sentence_conv"}
        assert axes["aggregations.N.word_conv.kernel"] == ((0, 1, 2), 3)
    assert {found for name, found in axes.items() if "conv" not in name} == {((0,), 1)}


@pytest.mark.parametrize("head", ["retinanet", "detr"])
def test_adamw_moves_the_last_layers_of_a_detector(head):
    config = model_config("tnt_ti_patch16_224", head=head, num_classes=5)
    axes = muon_dimensions(nnx.to_pure_dict(nnx.state(abstract_model(config))))["decoder"]
    classes, boxes = axes["classes"], axes["boxes"]
    if head == "retinanet":
        last, before = (classes["last"], boxes["last"]), (classes["convs"][3], boxes["convs"][3])
    else:
        last, before = (classes, boxes[2]), (boxes[1], axes["projection"])
    assert [layer["kernel"] for layer in last] == [None, None]
    assert None not in [layer["kernel"] for layer in before]


def test_gradients_are_clipped_as_in_pytorch(problem):
    start, gradients = problem
    gradient = jax.tree.map(jnp.float32, gradients[0])
    tensors = {name: torch.tensor(value, dtype=torch.float32, requires_grad=True) for name, value in start.items()}
    for name, tensor in tensors.items():
        tensor.grad = torch.tensor(gradients[0][name], dtype=torch.float32)
    torch.nn.utils.clip_grad_norm_(tensors.values(), 0.5)
    plain = {"learning_rate": 1.0, "weight_decay": 0.0, "beta1": 0.0}
    optimizer = make_optimizer(OptimizerConfig("sgd", clip_norm=0.5, **plain), lambda step: 1.0)
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), jax.tree.map(jnp.float32, start))
    for name, tensor in tensors.items():
        np.testing.assert_allclose(-updates[name], tensor.grad.numpy(), rtol=1e-5)

    kernel = torch.nn.Parameter(torch.tensor(start["kernel"].T.copy(), dtype=torch.float32))  # outputs first
    kernel.grad = torch.tensor(gradients[0]["kernel"].T.copy(), dtype=torch.float32)
    timm.utils.adaptive_clip_grad([kernel], clip_factor=0.1)
    optimizer = make_optimizer(OptimizerConfig("sgd", clip_ratio=0.1, **plain), lambda step: 1.0)
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), jax.tree.map(jnp.float32, start))
    np.testing.assert_allclose(-updates["kernel"], kernel.grad.numpy().T, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd", "beta2": 0.99}, "optimizer.beta2 is 0.99, which sgd does not have; leave it at 0.999"),
        ({"name": "schedule_free", "cooldown_epochs": 10}, "cooldown_epochs is 10, which schedule_free does not have"),
        ({"name": "schedule_free", "beta1": 0.0}, "optimizer.beta1 is 0, and must be above 0"),
    ],
)
def test_a_field_that_an_optimizer_does_not_have_is_refused(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check_optimizer(OptimizerConfig(**changes))


def test_every_optimizer_has_its_line():
    assert set(typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])) == set(OPTIMIZERS)


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
