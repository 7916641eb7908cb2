"""Parameters and multiply-accumulates, against the published table and against the program that is run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tnt_jax
from tnt_jax.models import heads
from tnt_jax.models.summary import count_macs, count_parameters, summary
from tnt_jax.models.tnt import grid_size, words_per_side
from tnt_jax.models.variants import VARIANTS, abstract_model, model_config


def macs_of_program(jaxpr) -> int:
    """Multiply-accumulates of every matrix product and convolution in a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = int(np.prod([equation.invars[0].aval.shape[axis] for axis in contracted]))
            total += equation.outvars[0].aval.size * depth
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            total += equation.outvars[0].aval.size * kernel.size // kernel.shape[out_axis]
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                total += macs_of_program(value.jaxpr)
    return total


def traced_macs(config) -> int:
    """Multiply-accumulates of the model's program without kernels, less those of the zeros that its stem multiplies by.

    The official stem is a matrix from all pixels of a patch to its words: 16 x 16 pixels where a convolution has 7 x 7.
    """
    graphdef, state = nnx.split(abstract_model(dataclasses.replace(config, inner="reference")))
    images = jnp.zeros((1, *config.image_size, config.in_channels))
    traced = macs_of_program(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, images).jaxpr)
    if config.architecture != "official":
        return traced
    words = math.prod(grid_size(config)) * words_per_side(config) ** 2
    return traced + words * config.inner_dim * config.in_channels * (7**2 - config.patch_size**2)


@pytest.mark.parametrize("name", VARIANTS)
def test_macs_are_the_published_ones_and_those_of_the_program(name):
    config = model_config(name)
    assert sum(count_macs(config).values()) == VARIANTS[name].macs
    assert traced_macs(config) == VARIANTS[name].macs


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("tnt_s_patch16_224", "linear", (64, 96)),
        ("tnt_s_patch16_224", "mlp", (64, 80)),
        pytest.param("tnt_s_patch16_224", "mlp_words", (64, 80), marks=pytest.mark.slow),
        ("ptnt_ti_patch16_192", "mlp", (64, 96)),
    ],
)
def test_macs_of_a_head_for_pixels_are_those_of_the_program(name, head, size, monkeypatch):
    """Without the enlarging of maps, which is no layer."""
    monkeypatch.setattr(heads, "resized", lambda maps, to: jnp.zeros((len(maps), *to, maps.shape[3])) + maps.sum())
    config = model_config(name, head=head, image_size=size, num_classes=7)
    assert sum(count_macs(config).values()) == traced_macs(config)
    assert sum(count_parameters(config).values()) == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param))
    )


def test_parts_of_tnt_s_are_those_of_the_published_table():
    macs = count_macs(model_config("tnt_s_patch16_224"))
    assert macs["words"] == 11_063_808
    assert macs["words to sentences"] == 346_816_512
    # q, k, v, both products, proj and MLP of the inner transformers
    assert macs["inner transformers"] == 43_352_064 + 3 * 21_676_032 - 21_676_032 + 2 * 14_450_688 + 173_408_256
    # 7,152 parameters in each inner transformer, 148,992 in each words-to-sentence projection
    parameters = count_parameters(model_config("tnt_s_patch16_224"))
    assert parameters["inner transformers"] == 12 * 7_152
    assert parameters["words to sentences"] == 12 * 148_992
    assert parameters["outer transformers"] == 12 * 1_773_312


OUTER_TOKENS = 196 * 384  # the papers count a parameter that upstream never uses


@pytest.mark.parametrize(
    ("name", "millions", "giga_macs"),
    [
        ("tnt_ti_patch16_224", None, 1.4),
        ("tnt_s_patch16_224", None, 5.2),
        ("tnt_b_patch16_224", None, 14.1),
        ("ptnt_ti_patch16_192", 10.6, 0.6),
        ("ptnt_s_patch16_256", 32.0, 3.3),
        ("ptnt_m_patch16_256", 85.0, 8.2),
        ("ptnt_b_patch16_256", 157.0, 16.0),
    ],
)
def test_counts_round_to_what_the_papers_print(name, millions, giga_macs):
    # 14.049 is printed as 14.1, and 84.944 as 85.0.
    assert sum(count_macs(model_config(name)).values()) / 1e9 == pytest.approx(giga_macs, abs=0.052)
    if millions:
        assert sum(count_parameters(model_config(name)).values()) / 1e6 == pytest.approx(millions, abs=0.06)


# Rows of TNT-S in the tables of arXiv 2103.00112: millions of parameters where they are printed, and billions of MACs.
ABLATIONS = {
    "table 4": ({}, 23.8, 5.2),
    "table 5, TNT-S-1": ({"inner_blocks": (0, 3, 7, 11)}, None, 4.8),
    "table 5, TNT-S-2": ({"inner_blocks": (0, 5, 11)}, None, 4.7),
    "table 5, TNT-S-3": ({"inner_blocks": (0, 5)}, None, 4.7),
    "table 5, TNT-S-4": ({"inner_blocks": (0,)}, None, 4.6),
    "table 6, none": ({"word_positions": False, "sentence_positions": False}, None, 5.2),
    "table 6, sentence": ({"word_positions": False}, None, 5.2),
    "table 6, word": ({"sentence_positions": False}, None, 5.2),
    # The table does not say how many heads words of 6 channels have; 4, as elsewhere, do not divide them.
    "table 8, 64 words": ({"word_stride": 2, "inner_dim": 6, "inner_heads": 2}, 23.8, 5.1),
    "table 8, 4 words": ({"word_stride": 8, "inner_dim": 96}, 25.1, 6.0),
    "table 12": ({"squeeze_excitation": True}, 24.7, 5.2),
} | {f"table 7, {heads} heads": ({"inner_heads": heads}, 23.8, 5.2) for heads in (1, 2, 4, 6, 8)}


# Between two others that differ from it in a number.
BETWEEN = {"table 5, TNT-S-2", "table 5, TNT-S-3", "table 6, sentence", "table 6, word"}
BETWEEN |= {f"table 7, {heads} heads" for heads in (2, 4, 6)}


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.nightly if row in BETWEEN else ()) for row in ABLATIONS]
)
def test_rows_of_the_papers_tables_are_configurations(row):
    changes, millions, giga_macs = ABLATIONS[row]
    config = model_config("tnt_s_patch16_224", **changes)
    parameters = sum(count_parameters(config).values())
    if millions:
        assert round((parameters + OUTER_TOKENS) / 1e6, 1) == millions
    macs = sum(count_macs(config).values())
    assert round(macs / 1e9, 1) == giga_macs
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(config)))) == parameters
    assert traced_macs(config) == macs


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"word_positions": False}, -16 * 24),
        ({"sentence_positions": False}, -197 * 384),
        # LN, 384 to 96, 96 to 384, in each of 12 blocks
        ({"squeeze_excitation": True}, 12 * (2 * 384 + 384 * 96 + 96 + 96 * 384 + 384)),
        ({"inner_blocks": (0,)}, -11 * (7_152 + 148_992)),
        ({"inner_heads": 8}, 0),
    ],
)
def test_an_ablation_changes_what_it_is_about(changes, parameters):
    counted = sum(count_parameters(model_config("tnt_s_patch16_224", **changes)).values())
    assert counted - VARIANTS["tnt_s_patch16_224"].parameters == parameters


def test_macs_of_a_pyramid_of_uneven_size_are_those_of_the_program():
    config = model_config("ptnt_ti_patch16_192", image_size=(104, 136), squeeze_excitation=True, in_channels=4)
    assert traced_macs(config) == sum(count_macs(config).values())
    assert "10,578,529" in summary("ptnt_ti_patch16_192")


def test_macs_at_384():
    macs = count_macs(model_config("tnt_s_patch16_224", image_size=384))
    assert sum(macs.values()) == pytest.approx(17.306e9, rel=1e-4)


def test_summary_shows_the_totals_of_a_name_a_configuration_and_a_module():
    text = summary("tnt_s_patch16_224")
    assert "23,768,584" in text
    assert "5,216,875,008" in text
    changes = {"image_size": 32, "patch_size": 8, "word_stride": 2, "depth": 1, "num_classes": 3}
    model = tnt_jax.create_model("tnt_ti_patch16_224", **changes)
    assert summary(model) == summary("tnt_ti_patch16_224", **changes) == summary(model.config)


def test_summary_says_how_the_inner_transformers_are_computed(on_platform, monkeypatch):
    assert "inner transformers: native" in summary("tnt_s_patch16_224")
    assert "inner transformers: reference" in summary("tnt_s_patch16_224", inner="reference")
    on_platform("gpu")
    assert "inner transformers: reference" in summary("tnt_s_patch16_224")
    assert "inner transformers: none" in summary("tnt_s_patch16_224", inner_blocks=())
