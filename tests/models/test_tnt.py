"""The network: sizes, modes and randomness. That it computes what was published is in tests/storage/pytorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tnt_jax
from tnt_jax.models.formulations.outer import add_to_patches
from tnt_jax.models.functions import drop_path, dropout
from tnt_jax.models.variants import VARIANTS, abstract_model, model_config

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "word_stride": 2,
    "depth": 2,
    "inner_dim": 6,
    "inner_heads": 2,
    "outer_dim": 24,
    "outer_heads": 3,
    "num_classes": 10,
}


def small(name: str = "tnt_s_patch16_224", **changes):
    return tnt_jax.create_model(name, **(SMALL | changes))


# Compiled once for each configuration and shape: op by op, a small TNT takes longer than a large one compiled.
run = nnx.jit(lambda model, *inputs: model(*inputs))
features = nnx.jit(lambda model, images: model.forward_features(images))


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_parameter_counts(name):
    model = abstract_model(model_config(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == VARIANTS[name].parameters


@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, 16),
        ({"image_size": (16, 40)}, 16),
        ({"word_stride": 4}, 4),
        ({"word_stride": 1, "in_channels": 1}, 64),
        ({"image_size": 40, "patch_size": 4, "in_channels": 5}, 4),
    ],
)
def test_any_size(name, changes, words):
    model = small(name, **changes)
    config = model.config
    rows, columns = (side // config.patch_size for side in config.image_size)
    x = images(2, *config.image_size, config.in_channels)
    shape_of = nnx.eval_shape
    assert shape_of(lambda: model(x)).shape == (2, 10)
    assert shape_of(lambda: model.forward_features(x)).shape == (2, 1 + rows * columns, 24)
    maps = shape_of(lambda: model.forward_intermediates(x, blocks=(0, -1), words=True))
    assert [(m.shape, w.shape) for m, w in maps] == [((2, rows, columns, 24), (2, rows, columns, words, 6))] * 2


def test_word_stride_that_does_not_divide_the_patch_is_rounded_up():
    model = small(word_stride=3)
    assert model.word_embedding(images(1, 32, 32, 3)).shape == (16, 9, 6)
    with pytest.raises(tnt_jax.InputError, match="word_stride 3 does not divide the patch size 8"):
        small("tnt_s_legacy_patch16_224", word_stride=3)


def test_official_words_see_their_patch_alone_and_legacy_words_see_over_its_border():
    x = images(1, 32, 32, 3)
    changed = x.at[:, :8, 8:16].set(0)  # the second patch of the first row
    for name, sees_beyond in (("tnt_s_patch16_224", False), ("tnt_s_legacy_patch16_224", True)):
        embed = small(name).word_embedding
        difference = np.abs(embed(x) - embed(changed)).max(axis=(1, 2)).reshape(4, 4)
        assert difference[0, 1] > 0
        assert (difference[0, 2] > 0) == sees_beyond, name


def test_no_classes_gives_the_normalised_class_token():
    model = small(num_classes=0)
    x = images(2, 32, 32, 3)
    tokens = features(model, x)[:, 0]
    np.testing.assert_allclose(run(model, x), tokens, atol=1e-6)
    (extracted,) = nnx.jit(lambda model, x: model.extract_feat(x))(model, x)
    np.testing.assert_allclose(extracted, tokens, atol=1e-6)


def test_one_image_does_not_depend_on_the_others():
    model, x = small(), images(2, 32, 32, 3)
    other = x.at[0].set(0)
    np.testing.assert_allclose(run(model, x)[1], run(model, other)[1], atol=1e-6)
    assert (run(model, x)[0] != run(model, other)[0]).any()


def test_seed_decides_the_parameters():
    first, again, other = (jax.tree.leaves(nnx.state(small(seed=seed))) for seed in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_initialisation_is_the_published_one():
    model = small(outer_dim=240, num_classes=100)
    block = model.blocks[0]
    for array in (block.outer.attn.qkv.kernel, block.outer.mlp.fc1.kernel, model.head.kernel, model.sentence_positions):
        assert float(array[...].std()) == pytest.approx(0.02, rel=0.1)
    assert not block.outer.mlp.fc1.bias[...].any()
    bound = (3 * 7 * 7) ** -0.5
    kernel = np.abs(model.word_embedding.conv.kernel[...])
    assert 0.95 * bound < kernel.max() <= bound
    assert np.abs(model.word_embedding.conv.bias[...]).max() <= bound


@pytest.mark.parametrize("remat", [pytest.param("linear", marks=pytest.mark.slow), "all"])
def test_remat_changes_neither_loss_nor_gradients(remat):
    x, key = images(2, 32, 32, 3), jax.random.key(1)
    model = small(drop_path_rate=0.3)
    graphdef, state = nnx.split(model)
    model.config = dataclasses.replace(model.config, remat=remat)
    remat_graphdef, _ = nnx.split(model)

    def loss(state, graphdef):
        return (nnx.merge(graphdef, state)(x, key) ** 2).sum()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    results = [value_and_grad(state, graph) for graph in (graphdef, remat_graphdef)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
    text = str(jax.make_jaxpr(lambda state: loss(state, remat_graphdef))(state))
    assert text.count("remat") == model.config.depth or text.count("checkpoint") == model.config.depth


def test_remat_computes_linear_maps_again_only_where_it_is_told_to():
    x, products = images(2, 32, 32, 3), {}
    for remat in ("none", "linear", "all"):
        graphdef, state = nnx.split(small(dtype="bfloat16", remat=remat))
        gradient = jax.grad(lambda state, graphdef=graphdef: nnx.merge(graphdef, state)(x).sum())
        products[remat] = str(jax.make_jaxpr(gradient)(state)).count("dot_general")
    assert products["none"] < products["linear"] < products["all"]


def test_bfloat16_is_for_computing_alone():
    model, reference = small(dtype="bfloat16"), small()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    x = images(2, 32, 32, 3)
    assert nnx.eval_shape(lambda: model.forward_features(x)).dtype == jnp.bfloat16
    _, outer = nnx.eval_shape(lambda: model.attention_maps(x))
    assert outer[0].dtype == jnp.float32
    assert run(model, x).dtype == jnp.float32
    np.testing.assert_allclose(run(model, x), run(reference, x), atol=0.02)


def test_parameters_can_be_bfloat16():
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(small(param_dtype="bfloat16")))} == {jnp.dtype("bfloat16")}


def test_attention_maps_are_what_the_blocks_use():
    model, x = small(), images(2, 32, 32, 3)
    inner, outer = nnx.jit(lambda model, x: model.attention_maps(x))(model, x)
    assert [w.shape for w in inner] == [(2, 4, 4, 2, 16, 16)] * 2
    assert [w.shape for w in outer] == [(2, 3, 17, 17)] * 2
    for weights in inner + outer:
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    # An attention that is made of these weights gives what the layer gives.
    block = model.blocks[0]
    words, sentences = model.embed(x)
    _, from_words = block.words_to_sentence(block.inner(words), 2)
    sentences = add_to_patches(sentences, from_words)
    normed = block.outer.norm1(sentences)
    value = (normed @ block.outer.attn.qkv.kernel[:, 48:]).reshape(2, 17, 3, 8)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", outer[0], value).reshape(2, 17, 24)
    attended = mixed @ block.outer.attn.proj.kernel[...] + block.outer.attn.proj.bias[...]
    np.testing.assert_allclose(block.outer.attn(normed), attended, atol=1e-5)


def test_without_a_key_nothing_is_random_and_with_one_everything_is():
    model, x = small(drop_path_rate=0.5, drop_rate=0.2, attn_drop_rate=0.2, depth=1), images(2, 32, 32, 3)
    plain, first, again, other = (run(model, x, *key) for key in ((), *((jax.random.key(k),) for k in (0, 0, 1))))
    np.testing.assert_array_equal(plain, run(small(depth=1), x))
    assert (plain != first).any()
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_drop_path_drops_whole_rows_and_keeps_the_mean():
    x = jnp.ones((4000, 3, 2))
    dropped = drop_path(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert (dropped == dropped[:, :1, :1]).all()
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)
    of_elements = dropout(x, 0.25, jax.random.key(0))
    assert (of_elements != dropped).any()
    assert set(np.unique(of_elements)) == {0, np.float32(1 / 0.75)}


def test_drop_path_is_per_patch_inside_and_per_image_outside_and_rises_linearly():
    model = small(drop_path_rate=0.6, depth=4)
    assert [block.outer.drop_path_rate for block in model.blocks] == pytest.approx([0, 0.2, 0.4, 0.6])
    block, x = model.blocks[3], images(64, 32, 32, 3)
    words, sentences = model.embed(x)
    moved = jnp.abs(block.inner(words, jax.random.key(0)) - words).max(axis=(1, 2)).reshape(64, 16)
    untouched = moved == 0
    assert 0.2 < untouched.mean() < 0.55  # both branches dropped: 0.36
    assert (untouched.any(axis=1) & ~untouched.all(axis=1)).any()  # patches of one image differ
    untouched = (block.outer(sentences, jax.random.key(0)) == sentences).all(axis=2)
    assert (untouched.all(axis=1) == untouched.any(axis=1)).all()  # the tokens of one image do not
    assert 0.1 < untouched.all(axis=1).mean() < 0.6


def test_images_of_another_shape_are_refused():
    with pytest.raises(tnt_jax.InputError, match=r"shape \(1, 24, 32, 3\).*takes \(batch, 32, 32, 3\)"):
        small()(images(1, 24, 32, 3))


def test_intermediates_of_a_block_that_is_not_there():
    with pytest.raises(tnt_jax.InputError, match=r"blocks \[3\] are out of range.*0 to 1"):
        small().forward_intermediates(images(1, 32, 32, 3), blocks=(0, 3))


def test_intermediates_stop_early_and_end_in_the_features():
    model, x = small(), images(1, 32, 32, 3)
    last = nnx.jit(lambda model, x: model.norm(model.forward_intermediates(x)[-1]))(model, x).reshape(1, 16, 24)
    np.testing.assert_allclose(last, features(model, x)[:, 1:], atol=1e-5)
    (first,) = nnx.eval_shape(lambda: model.forward_intermediates(x, blocks=(0,)))
    assert first.shape == (1, 4, 4, 24)


def test_holds_in_flax_tree_mode_and_graph_mode(monkeypatch):
    x = images(2, 32, 32, 3)
    outputs = []
    for graph in (True, False):
        with nnx.set_graph_mode(graph):
            outputs.append(nnx.jit(lambda model, x: model(x))(small(), x))
    np.testing.assert_array_equal(*outputs)


def test_resolved_configuration_describes_the_whole_model():
    config = model_config("tnt_b_patch16_224", num_classes=7)
    assert None not in dataclasses.asdict(config).values()
    assert (config.outer_dim, config.num_classes, config.image_size) == (640, 7, (224, 224))
