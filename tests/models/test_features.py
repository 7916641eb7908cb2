"""Features at several scales: their sizes, and that a linear map of them segments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from small_models import SMALL_PYRAMID, small_model, small_pyramid

import tnt_jax
from tnt_jax.models.features import FeaturePyramid, Upsample
from tnt_jax.models.layers import SqueezeExcitation


def test_four_blocks_of_tnt_give_strides_4_to_32():
    config = small_model(image_size=(64, 96), depth=4).config
    features = FeaturePyramid(config, rngs=nnx.Rngs(0))
    maps = [jnp.zeros((2, 4, 6, config.outer_dim))] * 4
    shapes = [out.shape for out in nnx.eval_shape(lambda: features(maps))]
    assert shapes == [(2, 64 // stride, 96 // stride, 12) for stride in (4, 8, 16, 32)]
    with pytest.raises(tnt_jax.InputError, match="there are 3 maps, and a feature pyramid is made of 4"):
        features(maps[1:])
    with pytest.raises(tnt_jax.InputError, match="ptnt_custom_patch8_32 has a pyramid of features in its stages"):
        FeaturePyramid(small_pyramid().config, rngs=nnx.Rngs(0))


def test_upsampling_is_the_transposed_convolution_of_pytorch():
    layer = Upsample(3, config=small_model().config, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    kernel = np.array(layer.linear.kernel[...]).reshape(3, 2, 2, 3).transpose(0, 3, 1, 2)
    expected = torch.nn.functional.conv_transpose2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(kernel.copy()), stride=2
    )
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected.permute(0, 2, 3, 1), atol=1e-6)


def test_squeeze_and_excitation_is_that_of_pytorch():
    layer = SqueezeExcitation(8, config=small_model().config, rngs=nnx.Rngs(0))
    reference = torch.nn.Sequential(
        torch.nn.LayerNorm(8), torch.nn.Linear(8, 2), torch.nn.ReLU(), torch.nn.Linear(2, 8), torch.nn.Tanh()
    )
    for ours, theirs in ((layer.fc1, reference[1]), (layer.fc2, reference[3])):
        ours.kernel[...] = jnp.asarray(theirs.weight.detach().numpy().T)
        ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    expected = torch.tensor(x) * reference(torch.tensor(x).mean(dim=1, keepdim=True))
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected.detach(), atol=1e-6)


def shapes(count, seed):
    """Noisy images with a bright square in each, and which places of a grid with stride 8 lie in it."""
    rng = np.random.default_rng(seed)
    images, masks = rng.normal(0, 0.3, (count, 64, 64, 1)).astype(np.float32), np.zeros((count, 8, 8), np.int32)
    for image, mask in zip(images, masks, strict=True):
        side, row, column = rng.integers(2, 5), *rng.integers(0, 4, 2)
        mask[row : row + side, column : column + side] = 1
        image[8 * row : 8 * (row + side), 8 * column : 8 * (column + side)] += 1
    return images, masks


@pytest.mark.parametrize("family", ["tnt", "pyramid"])
def test_a_linear_map_of_the_features_learns_to_segment(family):
    if family == "tnt":
        sizes = {"depth": 1, "inner_dim": 4, "inner_heads": 2, "outer_dim": 24, "outer_heads": 2}
        model = tnt_jax.create_model("tnt_ti_patch16_224", image_size=64, in_channels=1, num_classes=0, **sizes)
        pyramid = FeaturePyramid(model.config, rngs=nnx.Rngs(1))

        def features(pyramid, images):
            return pyramid(model.forward_intermediates(images) * 4)[1]
    else:
        sizes = SMALL_PYRAMID | {"outer_dim": (24, 12, 16, 16), "inner_dim": (8, 4, 4, 4)}
        model = tnt_jax.create_model(**sizes | {"image_size": 64, "in_channels": 1})
        pyramid = nnx.Dict()  # nothing but the linear map is trained

        def features(pyramid, images):
            return jax.lax.stop_gradient(model.forward_intermediates(images, blocks=(0,))[0])

    graphdef, params = nnx.split(pyramid)
    images, masks = shapes(64, seed=0)
    width = jax.eval_shape(lambda params: features(nnx.merge(graphdef, params), images), params).shape[-1]
    weights = (nnx.to_pure_dict(params), jnp.zeros((width, 2)), jnp.zeros(2))

    def logits(weights, images):
        params, kernel, bias = weights
        return features(nnx.merge(graphdef, params), images) @ kernel + bias

    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(weights):
        def loss(weights):
            return optax.softmax_cross_entropy_with_integer_labels(logits(weights, images), masks).mean()

        def step(carry, _):
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights), state)
            return (optax.apply_updates(weights, updates), state), None

        (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), length=60)
        return weights

    images_of_test, masks_of_test = shapes(64, seed=1)
    predicted = np.asarray(jax.jit(logits)(train(weights), images_of_test).argmax(-1))
    union = ((predicted == 1) | (masks_of_test == 1)).sum()
    assert ((predicted == 1) & (masks_of_test == 1)).sum() / union > 0.8  # all foreground: 0.15
