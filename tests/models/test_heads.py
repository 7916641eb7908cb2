"""Heads for every pixel: what they take of the blocks, in training too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model, small_pyramid

from tnt_jax.models.adapting import adapt
from tnt_jax.models.heads import map_blocks, resized
from tnt_jax.models.tnt import map_of_words
from tnt_jax.models.variants import model_config, with_changes
from tnt_jax.storage.folder import model_from_parameters, model_parameters

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 48, 3)), jnp.float32)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 12])
def test_the_maps_are_of_every_quarter_of_the_depth(depth):
    blocks = map_blocks(model_config("tnt_s_patch16_224", depth=depth, head="mlp"))
    assert len(blocks) == 4
    assert blocks[-1] == depth - 1
    assert list(blocks) == sorted(blocks)
    if depth == 12:
        assert blocks == (2, 5, 8, 11)  # 3, 6, 9 and 12 of the paper, from 1 on
    assert map_blocks(model_config("ptnt_s_patch16_256")) == (1, 9, 13, 15)


def test_words_lie_where_they_are_in_the_image():
    rows, columns, side = 2, 3, 4
    places = jnp.arange(rows * side * columns * side).reshape(rows, side, columns, side).transpose(0, 2, 1, 3)
    words = places.reshape(1, rows, columns, side * side, 1)
    found = map_of_words(words)
    np.testing.assert_array_equal(found.ravel(), np.arange(found.size))
    assert found.shape == (1, rows * side, columns * side, 1)


def test_without_its_words_the_head_is_the_one_that_has_none():
    model = small_model(head="mlp_words", image_size=(32, 48), depth=2, num_classes=5)
    of_mlp = {name: value for name, value in model_parameters(model).items() if "decoder.word_" not in name}
    plain = model_from_parameters(dataclasses.replace(model.config, head="mlp"), of_mlp)
    assert float(abs(model(IMAGES) - plain(IMAGES)).max()) > 1e-3
    model.decoder.word_linear.kernel[...] = jnp.zeros_like(model.decoder.word_linear.kernel[...])
    np.testing.assert_allclose(model(IMAGES), plain(IMAGES), atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "mlp", pytest.param("mlp_words", marks=pytest.mark.slow)])
def test_logits_are_of_every_pixel_and_every_parameter_learns(head):
    model = small_model(head=head, image_size=(32, 48), depth=2, num_classes=5)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradients(params):
        def total(params):
            logits = nnx.merge(graph, params, rest, copy=True)(IMAGES, jax.random.key(0))
            assert (logits.shape, logits.dtype) == ((2, 32, 48, 5), jnp.float32)
            return (logits**2).mean()

        return jax.grad(total)(params)

    for path, gradient in nnx.to_flat_state(gradients(params)):
        assert float(abs(gradient.get_value()).max()) > 0, path


@pytest.mark.slow
def test_a_pyramid_gives_every_pixel_too_and_its_batch_norm_trains():
    model = small_pyramid(head="mlp", image_size=(32, 64), num_classes=5)
    images = jnp.ones((2, 32, 64, 3)) * jnp.arange(64)[:, None] / 64
    before = model.decoder.mlp.norm.mean[...]
    assert nnx.jit(lambda model: model(images, jax.random.key(0)))(model).shape == (2, 32, 64, 5)
    assert float(abs(model.decoder.mlp.norm.mean[...] - before).max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_model, pytest.param(small_pyramid, marks=pytest.mark.nightly)])
def test_maps_in_training_are_those_of_the_features_with_the_same_key(make):
    model, key = make(drop_rate=0.3, drop_path_rate=0.3), jax.random.key(3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    (last,) = model.forward_intermediates(images, (-1,), key=key)
    tokens = model.norm(last.reshape(2, -1, last.shape[-1]))
    features = model.forward_features(images, key)
    np.testing.assert_allclose(tokens, features[:, -tokens.shape[1] :], atol=1e-5)
    assert float(abs(model.forward_intermediates(images, (-1,))[0] - last).max()) > 0.01


@pytest.mark.slow
def test_a_head_of_another_kind_is_fresh_and_one_of_the_same_stays():
    model = small_model(num_classes=3)
    given = model_parameters(model)
    wanted = with_changes(model.config, {"head": "mlp", "num_classes": 3})
    parameters, notes = adapt(given, model.config, wanted, seed=1)
    assert notes[0] == "the head is mlp, and that of the checkpoint class"
    again, _ = adapt(given, model.config, wanted, seed=1)
    dense = model_from_parameters(wanted, parameters)
    assert dense(jnp.zeros((1, 32, 32, 3))).shape == (1, 32, 32, 3)
    for path, value in parameters.items():
        np.testing.assert_array_equal(value, again[path])
        if not path.startswith(("head", "decoder")):
            np.testing.assert_array_equal(value, given[path])
    more = dataclasses.replace(wanted, num_classes=4)
    moved, _ = adapt(parameters, wanted, more)
    np.testing.assert_array_equal(moved["decoder.mlp.fuse.kernel"], parameters["decoder.mlp.fuse.kernel"])
    assert moved["head.kernel"].shape == (12, 4)
    back, _ = adapt(parameters, wanted, model.config)
    assert back.keys() == given.keys()


def test_a_detector_says_what_of_it_is_fresh():
    model = small_model(num_classes=3)
    wanted = with_changes(model.config, {"head": "retinanet"})
    parameters, notes = adapt(model_parameters(model), model.config, wanted, seed=1)
    assert notes == ["the head is retinanet, and that of the checkpoint class"]
    more = dataclasses.replace(wanted, num_classes=4)
    _, notes = adapt(parameters, wanted, more, seed=1)
    assert notes == ["2 arrays of the head retinanet are new"]


def test_maps_of_one_size_are_not_touched_and_constants_stay():
    maps = jnp.full((1, 3, 4, 2), 7.0)
    assert resized(maps, (3, 4)) is maps
    np.testing.assert_allclose(resized(maps, (13, 9)), 7.0, rtol=1e-6)
