"""Every layout, read into the model, computes what the published code computes: every block and the logits.

The bound of 1e-5 of the record's largest value is the golden README's; PyTorch's own float32 is within 1e-6.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import numpy as np
import published
import pytest
from flax import nnx

from tnt_jax.models import pyramid_tnt, tnt
from tnt_jax.storage.folder import model_from_parameters
from tnt_jax.storage.torch.read import recognise_config, recognise_layout, to_parameters

RECORDS = {
    "huawei_tnt_s": ("huawei", "tnt_s_patch16_224"),
    "huawei_tnt_ti_se": ("huawei", "tnt_custom_patch16_224"),
    "timm_tnt_s": ("timm", "tnt_s_patch16_224"),
    "timm_tnt_s_legacy": ("timm", "tnt_s_legacy_patch16_224"),
    "mmpretrain_tnt_s": ("mmpretrain", "tnt_s_legacy_patch16_224"),
    "huawei_ptnt_ti": ("huawei", "ptnt_ti_patch16_192"),
    "huawei_ptnt_s": ("huawei", "ptnt_s_patch16_256"),
}
# Of an architecture whose other record everybody compares with.
LATER = {"mmpretrain_tnt_s": pytest.mark.slow, "huawei_ptnt_s": pytest.mark.nightly}


compiled_blocks = {kind: nnx.jit(kind.__call__) for kind in (tnt.Block, pyramid_tnt.Block)}


@pytest.fixture(autouse=True)
def _blocks_share_one_compilation(monkeypatch):
    for kind, compiled in compiled_blocks.items():
        monkeypatch.setattr(kind, "__call__", compiled)


@functools.cache
def converted(name):
    arrays, manifest = published.record(name)
    tensors = published.state_dict(manifest)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layout = recognise_layout(shapes)
    config = recognise_config(layout, shapes)
    # The blocks are one program only if they have one rate of stochastic depth, which evaluation does not use.
    config = dataclasses.replace(config, drop_path_rate=0.0)
    return arrays, published.images(manifest), layout, config, to_parameters(tensors, layout, config)


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()


def returned_by_blocks(model, images):
    state = model.embed(images)
    if isinstance(model, pyramid_tnt.PyramidTNT):
        for stage in range(pyramid_tnt.STAGES):
            outputs = model.stage_outputs(stage, *state)
            state = outputs[-1]
            yield from outputs
    else:
        for block in model.blocks:
            state = block(*state)
            yield state


@pytest.mark.parametrize("name", [pytest.param(name, marks=LATER.get(name, ())) for name in RECORDS])
def test_every_block_and_the_logits_are_those_of_the_published_code(name):
    arrays, images, layout, config, parameters = converted(name)
    assert (layout, config.name) == RECORDS[name]
    model = model_from_parameters(config, parameters)
    errors = {"logits": relative_error(model(images), arrays["logits"])}
    for index, (words, sentences) in enumerate(returned_by_blocks(model, images)):
        errors[f"block{index:02}_words"] = relative_error(words[:3], arrays[f"block{index:02}_words"])
        errors[f"block{index:02}_sentences"] = relative_error(sentences[:, :3], arrays[f"block{index:02}_sentences"])
    assert errors.keys() == arrays.keys()
    assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if error >= 1e-5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name == "huawei_ptnt_ti" else pytest.param(name, marks=pytest.mark.nightly) for name in RECORDS],
)
def test_bfloat16_has_the_same_most_likely_class(name):
    """Up to its own rounding, 1 to 2.5% of the largest logit; one record's two best classes are only 2.3% apart."""
    arrays, images, _, config, parameters = converted(name)
    expected = arrays["logits"]
    logits = np.asarray(model_from_parameters(dataclasses.replace(config, dtype="bfloat16"), parameters)(images))
    assert relative_error(logits, expected) < 0.04
    of_the_likeliest = np.take_along_axis(expected, logits.argmax(-1)[:, None], -1)[:, 0]
    assert (of_the_likeliest >= expected.max(-1) - 0.04 * np.abs(expected).max()).all()


@pytest.mark.slow
def test_one_record_as_users_compile_it():
    """The other tests compile at XLA's lowest level, which is fast; users have its default, 3."""
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=3"}
    chosen = ["-k", "test_every_block_and_the_logits and huawei_tnt_s", "-p", "no:xdist", "-q", __file__]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen], env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "no tests ran" not in done.stdout
