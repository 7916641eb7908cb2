"""Parameters and multiply-accumulates, against the published table and against the program that is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tnt_jax
from tnt_jax.config import ModelConfig
from tnt_jax.models.summary import count_macs, count_parameters, summary
from tnt_jax.models.variants import VARIANTS, abstract_model, resolve


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


@pytest.mark.parametrize("name", VARIANTS)
def test_macs_are_the_published_ones_and_those_of_the_program(name):
    config = resolve(ModelConfig(name))
    assert sum(count_macs(config).values()) == VARIANTS[name].macs
    graphdef, state = nnx.split(abstract_model(config))
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(
        state, jnp.zeros((1, *config.image_size, 3))
    )
    assert macs_of_program(program.jaxpr) == VARIANTS[name].macs


def test_parts_of_tnt_s_are_those_of_the_published_table():
    macs = count_macs(ModelConfig("tnt_s_patch16_224"))
    assert macs["words"] == 11_063_808
    assert macs["words to sentences"] == 346_816_512
    # q, k, v, both products, proj and MLP of the inner transformers
    assert macs["inner transformers"] == 43_352_064 + 3 * 21_676_032 - 21_676_032 + 2 * 14_450_688 + 173_408_256
    # 7,152 parameters in each inner transformer, 148,992 in each words-to-sentence projection
    parameters = count_parameters(ModelConfig("tnt_s_patch16_224"))
    assert parameters["inner transformers"] == 12 * 7_152
    assert parameters["words to sentences"] == 12 * 148_992
    assert parameters["outer transformers"] == 12 * 1_773_312


def test_macs_at_384():
    macs = count_macs(ModelConfig("tnt_s_patch16_224", image_size=384))
    assert sum(macs.values()) == pytest.approx(17.306e9, rel=1e-4)


def test_summary_shows_the_totals_of_a_name_a_configuration_and_a_module():
    text = summary("tnt_s_patch16_224")
    assert "23,768,584" in text
    assert "5,216,875,008" in text
    changes = {"image_size": 32, "patch_size": 8, "word_stride": 2, "depth": 1, "num_classes": 3}
    model = tnt_jax.create_model("tnt_ti_patch16_224", **changes)
    assert summary(model) == summary("tnt_ti_patch16_224", **changes) == summary(model.config)
