"""PyramidTNT: sizes, modes and randomness. That it computes what was published is in tests/storage/pytorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from small_models import SMALL_PYRAMID, small_pyramid

import tnt_jax
from tnt_jax.evaluation.capture import observe
from tnt_jax.models.pyramid_tnt import Aggregation, ReducedAttention, stage_config
from tnt_jax.models.variants import model_config, with_formulation


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def model():
    return small_pyramid()


@pytest.mark.parametrize(
    ("image_size", "channels", "grids"),
    [
        ((32, 32), 3, [(4, 4), (2, 2), (1, 1), (1, 1)]),
        ((40, 56), 1, [(5, 7), (3, 4), (2, 2), (1, 1)]),
        ((64, 104), 5, [(8, 13), (4, 7), (2, 4), (1, 2)]),
    ],
)
def test_any_size_gives_a_pyramid_of_features(image_size, channels, grids):
    model = small_pyramid(image_size=image_size, in_channels=channels)
    x = images(2, *image_size, channels)
    assert jax.eval_shape(model, x).shape == (2, 3)
    assert jax.eval_shape(model.forward_features, x).shape == (2, np.prod(grids[-1]), 16)
    maps = jax.eval_shape(model.forward_intermediates, x)
    assert [m.shape for m in maps] == [(2, *grid, dim) for grid, dim in zip(grids, (8, 12, 16, 16), strict=True)]
    pairs = jax.eval_shape(lambda x: model.forward_intermediates(x, blocks=(1, -1), words=True), x)
    assert [(m.shape, w.shape) for m, w in pairs] == [
        ((2, *grids[1], 12), (2, *grids[1], 16, 4)),
        ((2, *grids[3], 16), (2, *grids[3], 16, 4)),
    ]


def test_published_sizes_have_strides_8_to_64():
    model = tnt_jax.models.variants.abstract_model(model_config("ptnt_s_patch16_256"))
    graphdef, state = nnx.split(model)
    maps = jax.eval_shape(
        lambda state, x: nnx.merge(graphdef, state).forward_intermediates(x), state, jnp.zeros((1, 256, 256, 3))
    )
    assert [m.shape for m in maps] == [(1, 32, 32, 128), (1, 16, 16, 256), (1, 8, 8, 512), (1, 4, 4, 512)]


def test_odd_grids_get_zeros_at_their_end_before_they_are_merged():
    config = model_config(**SMALL_PYRAMID | {"image_size": (40, 56)})
    before, after = stage_config(config, 0), stage_config(config, 1)
    aggregation = Aggregation((5, 7), config=before, following=after, rngs=nnx.Rngs(0))
    words, sentences = images(2 * 35, 16, 2), images(2, 35, 8)
    new_words, new_sentences = nnx.jit(Aggregation.__call__)(aggregation, words, sentences)

    def normed(x, norm):
        return torch.nn.functional.layer_norm(torch.tensor(np.array(x)), x.shape[-1:], *torch_of(norm), eps=1e-5)

    def convolved(maps, conv):
        maps = torch.nn.functional.conv2d(maps.permute(0, 3, 1, 2), *torch_of(conv), stride=2, padding=1)
        return maps.permute(0, 2, 3, 1)

    maps = normed(sentences.reshape(2, 5, 7, 8), aggregation.sentence_norm)
    expected = convolved(maps, aggregation.sentence_conv).reshape(2, 12, 12)
    np.testing.assert_allclose(new_sentences, expected, atol=1e-5)

    padded = torch.zeros(2, 6, 8, 4, 4, 2)
    padded[:, :5, :7] = normed(words.reshape(2, 5, 7, 4, 4, 2), aggregation.word_norm)
    for row, column in ((0, 0), (1, 2), (2, 3)):  # the last one lies at both borders
        upper, lower = (
            torch.cat([padded[1, 2 * row + i, 2 * column], padded[1, 2 * row + i, 2 * column + 1]], dim=1)
            for i in (0, 1)
        )
        expected = convolved(torch.cat([upper, lower])[None], aggregation.word_conv).reshape(16, 4)
        np.testing.assert_allclose(new_words.reshape(2, 3, 4, 16, 4)[1, row, column], expected, atol=1e-5)


def torch_of(module):
    weight = np.array(module.kernel[...]).transpose(3, 2, 0, 1) if hasattr(module, "kernel") else module.scale[...]
    return torch.tensor(np.array(weight)), torch.tensor(np.array(module.bias[...]))


def test_keys_of_an_uneven_grid_are_the_means_of_its_whole_squares():
    config = model_config(**SMALL_PYRAMID)
    attention = ReducedAttention(8, 2, grid=(5, 7), reduction=2, config=config, rngs=nnx.Rngs(0))
    x = images(1, 35, 8)
    weights = attention.weights(x)
    assert weights.shape == (1, 2, 35, 6)
    border = x.reshape(1, 5, 7, 8).at[:, 4:].set(9).at[:, :, 6:].set(9).reshape(1, 35, 8)
    inside = np.zeros((5, 7), bool)
    inside[:4, :6] = True
    np.testing.assert_array_equal(attention.weights(border)[:, :, inside.ravel()], weights[:, :, inside.ravel()])


def test_attention_maps_are_the_softmax_that_each_block_computes():
    """With position biases that matter, after the words were added."""
    model = with_formulation(small_pyramid(image_size=64), "reference")
    for stage in model.stages:
        bias = stage.position_bias[...]
        stage.position_bias[...] = 3 * jax.random.normal(jax.random.key(0), bias.shape)
    x = images(2, 64, 64, 3)
    inner, outer = model.attention_maps(x)
    blocks, _ = observe(*nnx.split(model), x, jnp.array([0, 2]))
    for weights, words, block in zip(outer, inner, blocks, strict=True):
        np.testing.assert_allclose(weights, block.outer, atol=1e-5)
        np.testing.assert_allclose(words.reshape(block.inner.shape), block.inner, atol=1e-5)


def test_attention_maps_are_those_of_every_block(model):
    x = images(2, 32, 32, 3)
    inner, outer = nnx.jit(lambda model, x: model.attention_maps(x))(model, x)
    assert [w.shape for w in inner] == [(2, 4, 4, 1, 16, 16), *((2, n, n, 2, 16, 16) for n in (2, 1, 1))]
    assert [w.shape for w in outer] == [(2, 2, 16, 1), (2, 2, 4, 1), (2, 2, 1, 1), (2, 2, 1, 1)]
    for weights in inner + outer:
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    sparse = small_pyramid(depth=(1, 2, 1, 1))
    inner, _ = jax.eval_shape(sparse.attention_maps, x)
    assert [weights is None for weights in inner] == [False, False, True, False, False]


def test_the_position_bias_decides_what_is_attended_to():
    model = small_pyramid(image_size=64)
    stage = model.stages[1]
    stage.position_bias[...] = stage.position_bias[...].at[:, 1, 3, 2].set(100)
    words, sentences = jnp.asarray(images(16, 16, 4)), jnp.asarray(images(1, 16, 12))
    weights = stage.blocks[0].outer.attention_weights(sentences, stage.position_bias[...])
    assert weights[0, 1, 3].argmax() == 2
    assert weights[0, 1, 3, 2] == pytest.approx(1)
    bias = stage.position_bias[...]
    (_, changed), (_, plain) = (stage.blocks[0](words, sentences, each) for each in (bias, 0 * bias))
    assert np.abs(changed - plain).max() > 0.01


def test_a_key_makes_it_train():
    model = small_pyramid(drop_path_rate=0.5)
    x, before = images(4, 32, 32, 3), np.array(model.stem.words.norm.mean[...])
    run = nnx.jit(lambda model, x, key: model(x, key))
    first, other = run(model, x, jax.random.key(0)), run(model, x, jax.random.key(1))
    assert np.abs(first - other).max() > 1e-3
    after = np.array(model.stem.words.norm.mean[...])
    assert np.abs(after - before).max() > 1e-3
    model.embed(x)
    np.testing.assert_array_equal(model.stem.words.norm.mean[...], after)


def test_initialisation_is_the_published_one():
    model = tnt_jax.create_model("ptnt_ti_patch16_192", image_size=64)
    for array, std in (
        (model.stages[0].blocks[0].outer.attn.qkv.kernel, 0.02),
        (model.sentence_positions, 0.02),
        (model.stages[0].position_bias, 1),
        (model.stem.sentences3.conv.kernel, (2 / (9 * 80)) ** 0.5),
        (model.aggregations[0].sentence_conv.kernel, (2 / (9 * 160)) ** 0.5),
    ):
        assert float(array[...].std()) == pytest.approx(std, rel=0.1)
    assert not model.stem.sentences3.conv.bias[...].any()


def test_bfloat16_is_for_computing_alone():
    x = images(2, 32, 32, 3)
    half = small_pyramid(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    assert jax.eval_shape(half.forward_features, x).dtype == jnp.bfloat16
    assert jax.eval_shape(half, x).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "depth is 3, and a PyramidTNT has one for each of its 4 stages"),
        ({"outer_dim": (8, 8, 8)}, r"outer_dim is \(8, 8, 8\), and .* its 4 stages"),
        ({"inner_heads": (1, 2, 3, 4)}, "inner_dim 20 cannot be divided among inner_heads 3"),
        ({"image_size": 24}, r"\(24, 24\) is too small: the first stage needs 32"),
        ({"image_size": (64, 100)}, r"\(64, 100\) is not a multiple of the patch size 8; the nearest is \(64, 96\)"),
        ({"patch_size": 16}, "patch_size 16 and word_stride 2: the stem of a PyramidTNT makes patches of 8"),
        ({"inner_blocks": (0, 13)}, r"inner_blocks \[13\] are out of range: the model has blocks 0 to 12"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(changes, message):
    with pytest.raises(tnt_jax.InputError, match=message):
        tnt_jax.create_model("ptnt_ti_patch16_192", **changes)
