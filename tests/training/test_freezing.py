"""What is frozen stays as it is, has no gradient and no state; other optimizers train, and go on as if undisturbed."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from small_runs import assert_ended_as, check_program, parameters, tiny_run

import tnt_jax
from tnt_jax.config import InputError, OptimizerConfig
from tnt_jax.models.variants import complete
from tnt_jax.storage.folder import model_parameters
from tnt_jax.storage.reading import steps_of
from tnt_jax.training.loop import train
from tnt_jax.training.mesh import make_mesh
from tnt_jax.training.program import Program
from tnt_jax.training.trees import frozen_mask

PARAMETERS = {
    "word_embedding": {"conv": {"kernel": 0}},
    "blocks": {index: {"inner": {"kernel": 0}, "outer": {"kernel": 0}} for index in range(12)},
    "head": {"kernel": 0, "bias": 0},
}


def frozen(*patterns):
    mask = jax.tree.leaves_with_path(frozen_mask(PARAMETERS, patterns))
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, still in mask if still}


def test_patterns_are_beginnings_of_paths_with_ranges_and_wildcards():
    assert frozen() == set()
    both = {f"blocks.{index}.{part}.kernel" for index in (9, 10, 11) for part in ("inner", "outer")}
    assert frozen("blocks.9-11") == both
    assert frozen("blocks.1") == {"blocks.1.inner.kernel", "blocks.1.outer.kernel"}
    assert frozen("blocks.*.inner") == {f"blocks.{index}.inner.kernel" for index in range(12)}
    assert frozen("all-but-head") == frozen("word_embedding", "blocks")
    assert frozen("head.bias", "word*") == {"head.bias", "word_embedding.conv.kernel"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["block.3"],
            "freeze is 'block.3', which fits no parameter; their paths begin with blocks, head, word_embedding",
        ),
        (["blocks.12"], "freeze is 'blocks.12', which fits no parameter"),
        (["blocks", "all-but-blocks"], "freeze is blocks all-but-blocks, which leaves no parameter to train"),
    ],
)
def test_what_fits_nothing_or_leaves_nothing_is_refused(patterns, message):
    with pytest.raises(InputError) as error:
        frozen(*patterns)
    assert message in str(error.value)


def goes_on(config, steps_lost=1):
    """Trains, loses the last checkpoint as if it had been killed before, and goes on in a copy of the folder."""
    train(config)
    copy = config.run_dir + "_copy"
    shutil.copytree(config.run_dir, copy)
    for step in steps_of(copy)[-steps_lost:]:
        shutil.rmtree(f"{copy}/checkpoints/{step}")
    again = dataclasses.replace(config, run_dir=copy)
    train(again)
    assert_ended_as(again, config)


@pytest.mark.slow
def test_what_is_frozen_stays_and_the_rest_goes_on_exactly(tmp_path):
    config = tiny_run(tmp_path / "run", freeze=("word_embedding", "blocks.0.inner", "head.bias"))
    goes_on(config)
    sizes = dataclasses.asdict(config.model) | {"num_classes": 10, "seed": config.seed}
    start = model_parameters(tnt_jax.create_model(**sizes))
    for weights in ("ema", "raw"):
        end = model_parameters(tnt_jax.load_model(config.run_dir, weights=weights))
        still = {name for name in end if (np.asarray(end[name]) == np.asarray(start[name])).all()}
        wanted = {name for name in end if name.startswith(("word_embedding", "blocks.0.inner")) or name == "head.bias"}
        assert wanted
        assert still == wanted


def test_a_probe_of_the_head_computes_no_gradient_and_keeps_no_state_of_the_rest():
    config = complete(tiny_run("unused"), 10)
    mesh = make_mesh(devices=jax.devices()[:1])
    whole, probe = (
        Program(dataclasses.replace(config, freeze=freeze), mesh, steps_per_epoch=11)
        for freeze in ((), ("all-but-head",))
    )
    flops = [
        program.train_step.lower(program.abstract_state, program.abstract_batch).compile().cost_analysis()["flops"]
        for program in (whole, probe)
    ]
    assert flops[1] < flops[0] / 2
    moments = sum(leaf.size for leaf in jax.tree.leaves(probe.abstract_state.opt_state) if leaf.ndim)
    assert moments == 2 * (12 * 10 + 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("muon", marks=pytest.mark.nightly), "schedule_free"])
def test_a_run_with_another_optimizer_goes_on_exactly_and_learns(name, tmp_path):
    optimizer = OptimizerConfig(name, learning_rate=1e-2, warmup_epochs=1, clip_norm=1.0, layer_decay=0.9)
    goes_on(tiny_run(tmp_path / "run", optimizer=optimizer))
    ema, raw = (parameters(tmp_path / "run", weights=weights) for weights in ("ema", "raw"))
    assert any((ours != theirs).any() for ours, theirs in zip(ema, raw, strict=True))


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "schedule_free"])
def test_what_is_frozen_is_left_out_by_every_kind_of_optimizer(name):
    optimizer = OptimizerConfig(name, clip_norm=1.0, clip_ratio=0.1, layer_decay=0.9)
    config = complete(tiny_run("unused", optimizer=optimizer, freeze=("blocks.0.inner",)), 10)
    program = Program(config, make_mesh(devices=jax.devices()[:1]), steps_per_epoch=11)
    check_program(program)
    whole = Program(dataclasses.replace(config, freeze=()), make_mesh(devices=jax.devices()[:1]), steps_per_epoch=11)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(each.abstract_state.opt_state)) for each in (program, whole)]
    assert sizes[0] < sizes[1]
