"""Names, and what happens to wrong ones and wrong sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

import tnt_jax
from tnt_jax.models.variants import model_config


def test_list_models_takes_wildcards():
    assert "tnt_s_patch16_224" in tnt_jax.list_models("tnt_*")
    assert tnt_jax.list_models("tnt_?_patch16_224") == ["tnt_b_patch16_224", "tnt_s_patch16_224"]
    assert tnt_jax.list_models("nothing*") == []


def test_mmpretrains_name_is_the_legacy_architecture():
    config = model_config("tnt-small-p16_3rdparty_in1k")
    assert (config.name, config.architecture) == ("tnt_s_legacy_patch16_224", "legacy")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tnt_x_patch16_224", {}, "no model 'tnt_x_patch16_224'; the nearest names are .*tnt_s_patch16_224"),
        ("tnt_s_patch16_224", {"image_size": (200, 224)}, r"\(200, 224\) is not a multiple of .* 16.*\(192, 224\)"),
        ("tnt_s_patch16_224", {"image_size": 8}, r"\(8, 8\) is not a multiple of the patch size 16.*\(16, 16\)"),
        ("tnt_s_patch16_224", {"inner_heads": 5}, "inner_dim 24 cannot be divided among inner_heads 5"),
        ("tnt_s_patch16_224", {"outer_dim": 100}, "outer_dim 100 cannot be divided among outer_heads 6"),
        ("tnt_s_patch16_224", {"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ("tnt_s_patch16_224", {"depth": 0}, "depth is 0"),
        ("tnt_s_patch16_224", {"word_stride": 17}, "word_stride 17 is larger than the patch size 16"),
        ("tnt_s_patch16_224", {"architecture": "Legacy"}, "architecture is 'Legacy'.*official, legacy"),
        ("tnt_s_patch16_224", {"dtype": "float16"}, "dtype is 'float16'.*float32, bfloat16"),
        ("tnt_s_patch16_224", {"num_class": 10}, "no field 'num_class'; did you mean num_classes"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(name, changes, message):
    with pytest.raises(tnt_jax.InputError, match=message):
        tnt_jax.create_model(name, **changes)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("bfloat16"), jnp.dtype("bfloat16")])
def test_a_dtype_is_taken_as_flax_users_write_it(dtype):
    assert tnt_jax.create_model("tnt_ti_patch16_224", depth=1, dtype=dtype).config.dtype == "bfloat16"
    with pytest.raises(tnt_jax.InputError, match="dtype is 'float16'"):
        tnt_jax.create_model("tnt_ti_patch16_224", dtype=np.float16)
