"""Every field of a configuration refuses values that mean nothing, by name and with what would be right."""

import dataclasses
import json
import math
import pickle
import typing

import numpy as np
import pytest
from commands import run

from tnt_jax.commands.cli import CALLED, smoke, training_config
from tnt_jax.config import (
    DataConfig,
    InputError,
    LossConfig,
    ModelChanges,
    ModelConfig,
    TrainConfig,
    check,
)
from tnt_jax.fields import role_of
from tnt_jax.models.variants import VARIANTS, as_changes, complete, resolve
from tnt_jax.storage.description import from_json, to_json
from tnt_jax.storage.run import by_role

CONFIG = complete(TrainConfig(), num_classes=10)


def paths(config, prefix=()):
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from paths(value, (*prefix, field.name))
        else:
            yield (*prefix, field.name)


def replaced(config, path, value):
    name, *rest = path
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), rest, value) if rest else value})


def meaningless(config, path):
    """Values of another type, beyond each bound, and not finite."""
    *parts, name = path
    for part in parts:
        config = getattr(config, part)
    (field,) = [field for field in dataclasses.fields(config) if field.name == name]
    hint = typing.get_type_hints(type(config))[name]
    value = getattr(config, name)
    yield from (object(), b"", {})
    if hint in (int, float, bool):
        yield from ("1", None)
    if hint is int:
        yield from (1.5, True)
    if isinstance(value, float) or hint is float:
        yield from (math.nan, math.inf, -math.inf)
    if hint is str or "str" in str(hint):
        yield from (1, "")
    if "Literal" in str(hint):
        yield "something else"
    step = 1 if isinstance(value, int) or value is None else 1e-9
    for words, bound in field.metadata.get("bounds", {}).items():
        bad = {"at least": bound - step, "above": bound, "at most": bound + step, "below": bound}[words]
        yield (bad,) * max(1, len(value)) if isinstance(value, tuple) else bad


@pytest.mark.parametrize("path", list(paths(CONFIG)), ids=".".join)
def test_a_value_that_means_nothing_is_refused_by_name(path):
    values = list(meaningless(CONFIG, path))
    assert len(values) > 3
    for value in values:
        with pytest.raises(InputError) as error:
            check(replaced(CONFIG, path, value))
        assert str(error.value).startswith(f"{'.'.join(path)} is {value!r}, and must be "), error.value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.learning_rate", -1.0, "optimizer.learning_rate is -1.0, and must be above 0"),
        ("optimizer.ema_decay", 2.0, "optimizer.ema_decay is 2.0, and must be at least 0 and below 1"),
        ("optimizer.change_every", "day", "optimizer.change_every is 'day', and must be one of step, epoch"),
        ("model.image_size", "32", "model.image_size is '32', and must be 2 whole numbers"),
        ("model.depth", 2.0, "model.depth is 2.0, and must be a whole number or whole numbers"),
        ("data.crop_area", (0.1, 2.0), "data.crop_area is (0.1, 2.0), and must be above 0 and at most 1"),
        ("data.crop_area", (0.5, 0.2), "data.crop_area is 0.5 to 0.2, and must rise"),
        ("init_from", "", "init_from is '', and must be a text that is not empty"),
        ("seed", -1, "seed is -1, and must be at least 0"),
    ],
)
def test_the_message_says_what_would_be_right(path, value, message):
    with pytest.raises(InputError) as error:
        check(replaced(CONFIG, path.split("."), value))
    assert str(error.value) == message


@pytest.mark.parametrize("run_dir", ["s3://bucket/run", "az://container/run", "gs://bucket/s3://run"])
def test_an_address_is_no_folder_of_a_run(run_dir):
    with pytest.raises(InputError, match=f"run_dir is {run_dir}, and a run lies on a disk"):
        check(dataclasses.replace(CONFIG, run_dir=run_dir))


def test_a_process_has_a_number_below_their_count():
    with pytest.raises(InputError, match="process_id is 2, and must be below"):
        check(replaced(replaced(CONFIG, ("distributed", "num_processes"), 2), ("distributed", "process_id"), 2))


def test_what_changes_a_model_has_the_fields_of_a_model_all_optional():
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    assert [field.name for field in dataclasses.fields(ModelChanges)] == fields
    assert {name for name in fields if getattr(ModelChanges(), name) is not None} == {"name"}
    assert pickle.loads(pickle.dumps(ModelChanges(depth=2))) == ModelChanges(depth=2)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_complete_model_has_no_field_that_is_none_and_comes_back(name):
    config = resolve(ModelChanges(name))
    assert config == VARIANTS[name].config
    assert None not in dataclasses.asdict(config).values()
    smaller = resolve(ModelChanges(name, image_size=[64, 96], num_classes=np.int64(7), inner="reference"))
    assert (smaller.name, smaller.image_size, smaller.num_classes) == (name, (64, 96), 7)
    assert resolve(as_changes(smaller)) == smaller


def test_other_sizes_than_published_have_no_published_name():
    changes = ModelChanges("tnt_ti_patch16_224", image_size=32, patch_size=8, word_stride=2, depth=2)
    config = resolve(changes)
    assert (config.name, config.inner_blocks) == ("tnt_custom_patch8_32", (0, 1))
    assert resolve(as_changes(config)) == config
    assert resolve(ModelChanges("ptnt_s_patch16_256", depth=(1, 8, 1, 1))).inner_blocks == (0, 1, 2, 9, 10)


def test_a_run_goes_through_json_and_back():
    config = TrainConfig(model=ModelChanges(image_size=(32, 48)), run_dir="elsewhere")
    assert from_json(to_json(config), TrainConfig[ModelChanges]) == config
    assert from_json(to_json(CONFIG)) == CONFIG
    with pytest.raises(InputError, match=r"TrainConfig has no field epoch; this was written by another version"):
        from_json(to_json(CONFIG) | {"epoch": 1})
    with pytest.raises(InputError, match=r"ModelConfig needs the field depth; this was written by another version"):
        from_json({"model": {name: value for name, value in to_json(CONFIG)["model"].items() if name != "depth"}})


def test_how_a_run_is_computed_and_watched_is_marked():
    roles = {field.name: role_of(field) for field in dataclasses.fields(TrainConfig)}
    assert (roles["seed"], roles["fsdp"], roles["wandb"]) == ("identity", "execution", "observation")


def test_a_shrunk_run_of_any_task_is_one_of_classes():
    data = DataConfig("csv:a.csv", task="multi_label", sampling="balanced")
    shrunk = smoke(TrainConfig(data=data, loss=LossConfig(positive_weights="balanced"), best_metric="map"))
    check(shrunk)
    assert (shrunk.data.task, shrunk.data.sampling, shrunk.best_metric) == ("single_label", "natural", None)


def test_the_file_that_a_run_leaves_names_the_run(tmp_path):
    config = complete(training_config(["--epochs", "7"]), 10)
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    assert training_config(["--config", str(tmp_path / "config.json")]).epochs == 7
    assert training_config(["--config", str(tmp_path)]).epochs == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1e-3"], "--lr is not a flag of this command; here it is --optimizer.learning-rate"),
        (["--img_size=224"], "--img_size=224 is not a flag of this command; here it is --model.image-size"),
        (["--resume"], "here it is the same command again, which goes on by itself"),
        (["--model.image-size", "224x192"], "write height and width as two numbers: 224 192"),
    ],
)
def test_words_of_other_tools_are_answered_with_ours(arguments, message):
    code, out, err = run("train.py", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_no_flag_of_ours_is_taken_for_one_of_others():
    """And what is said to be ours is."""
    flags = {f"--{name.replace('_', '-')}" for name in by_role(training_config([]))}
    others = {name for names in CALLED.values() for name in names}
    assert not others & flags
    told = {ours.split()[0] for ours in CALLED if ours.startswith("--")}
    assert told <= flags | {"--run-dir"}
