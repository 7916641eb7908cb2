"""Every configuration that this project ships: it says what it is, and it trains."""

import ast
import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from commands import ROOT, run
from small_runs import check_program

from tnt_jax.chips import chip_of, training_flops
from tnt_jax.commands.cli import training_config
from tnt_jax.config import ModelChanges
from tnt_jax.models.summary import count_macs
from tnt_jax.models.variants import complete, resolve
from tnt_jax.training.mesh import make_mesh
from tnt_jax.training.program import Program

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_says_what_to_type_and_holds_a_model_that_can_be_made(name):
    path = ROOT / "configs" / name
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert "python train.py" in docstring
    config = runpy.run_path(str(path))["get_config"]()
    assert resolve(config.model)
    assert config.run_dir.startswith("runs/")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("imagenet_")])
def test_chip_hours_are_those_of_the_plan(name):
    """The FLOPs of all epochs at 39 and 26% of a TPU v5e's peak."""
    path = ROOT / "configs" / name
    config = complete(runpy.run_path(str(path))["get_config"](), 1000)
    epochs = config.epochs + config.optimizer.cooldown_epochs
    flops = 1_281_167 * epochs * training_flops(sum(count_macs(config.model).values()))
    hours = flops / chip_of("TPU v5e").flops / 3600
    docstring = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    said = f"An estimate: {hours / 0.39:.0f} to {hours / 0.26:.0f} chip-hours of TPU v5e"
    assert said in docstring
    assert f"its {flops:.1e} FLOPs".replace("e+", "e") in docstring


def test_smoke_shrinks_what_takes_long_and_keeps_the_recipe():
    config = training_config(["--config", "imagenet_tnt_b", "--smoke", "--epochs", "1"])
    assert (config.epochs, config.model.depth, config.data.source) == (1, 2, "synthetic:512")
    assert (config.data.repeats, config.data.mixup, config.optimizer.change_every) == (3, 0.8, "epoch")
    assert config.model.name == "tnt_b_patch16_224"
    config = training_config(["--config", "imagenet_ptnt_b", "--smoke"])
    assert (resolve(config.model).depth, config.model.outer_dim) == ((1, 1, 1, 1), (80, 160, 320, 320))


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_b", "ptnt_ti", "ptnt_s", "ptnt_m", "ptnt_b"])
def test_every_size_is_trained_by_the_published_recipe_a_pyramid_tnt_with_20_epochs_of_warm_up(name):
    recipe, config = (training_config(["--config", f"imagenet_{each}"]) for each in ("tnt_s", name))
    warmup = 20 if name.startswith("ptnt") else 5
    assert (recipe.optimizer.warmup_epochs, config.optimizer.warmup_epochs) == (5, warmup)
    assert config.model == ModelChanges(config.model.name, dtype="bfloat16")
    assert config.model.name.startswith(f"{name}_patch16")
    assert config.run_dir == f"runs/imagenet_{name}"
    optimizer = dataclasses.replace(config.optimizer, warmup_epochs=5)
    changes = {"run_dir": recipe.run_dir, "model": recipe.model, "optimizer": optimizer}
    assert dataclasses.replace(config, **changes) == recipe


def test_sizes_of_stages_are_numbers_on_the_command_line():
    sizes = ["--model.depth", "1", "2", "1", "1", "--model.inner-blocks", "0", "3"]
    config = training_config(["--config", "imagenet_ptnt_ti", *sizes])
    assert (config.model.depth, config.model.inner_blocks) == ((1, 2, 1, 1), (0, 3))


@pytest.mark.nightly  # the README's page trains one of them before anything lands
@pytest.mark.parametrize("name", CONFIGS)
def test_trains_when_shrunk(name, tmp_path):
    config = pathlib.Path(ROOT / "configs" / name)
    code, out, err = run("train.py", "--config", config, "--smoke", "--run-dir", tmp_path / "run")
    assert code == 0, err
    assert any(f"test {title} " in out for title in ("accuracy", "mIoU", "AP")), out
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text, "which JSON does not have"
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["kind"] for line in lines} == {"train", "test"}


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "imagenet_tnt_s.py" else pytest.mark.nightly)
        for name in CONFIGS
    ],
)
def test_a_step_maps_its_state_to_itself(name, param_dtype):
    config = runpy.run_path(str(ROOT / "configs" / name))["get_config"]()
    model = dataclasses.replace(config.model, param_dtype=param_dtype)
    config = complete(dataclasses.replace(config, model=model), config.model.num_classes or 1000)
    program = Program(config, make_mesh(devices=jax.devices()[:1]), steps_per_epoch=100)
    check_program(program)
    for kept in (program.abstract_state.params, program.abstract_state.ema):
        assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32")}, "whatever the model's are"


def test_a_step_that_does_not_is_refused():
    config = complete(training_config(["--smoke"]), 10)
    program = Program(config, make_mesh(devices=jax.devices()[:1]), steps_per_epoch=10)
    check_program(program)
    ema = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), program.abstract_state.ema)
    program.abstract_state = dataclasses.replace(program.abstract_state, ema=ema)
    with pytest.raises(TypeError, match=r"a train step makes ema.* float32 .* of bfloat16"):
        check_program(program)
