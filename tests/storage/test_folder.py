import dataclasses
import json
import math
import os
import shutil
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.data.classes import read_class_names
from tnt_jax.models.variants import fresh_model
from tnt_jax.storage import description as described
from tnt_jax.storage import folder as saving
from tnt_jax.storage.files import write_whole
from tnt_jax.storage.publish import publish
from tnt_jax.storage.torch.write import export

NAMES = ("ant", "bee", "cat")
SMALL = {"depth": 1, "inner_dim": 4, "inner_heads": 2, "outer_dim": 12, "outer_heads": 3}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(model, tmp_path):
    saving.save_model(model, tmp_path / "model", class_names=NAMES, source={"file": "a.pth"})
    return tmp_path / "model"


def test_a_saved_model_comes_back_bit_for_bit_with_its_description(model, folder):
    loaded = tnt_jax.load_model(folder)
    before, after = saving.model_parameters(model), saving.model_parameters(loaded)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert loaded.config == model.config
    description = described.description_of(loaded)
    assert description.class_names == NAMES
    assert description.source == {"file": "a.pth"}
    assert (description.preprocessing.image_size, description.preprocessing.crop) == ((32, 32), 0.9)


def test_a_bfloat16_model_of_grey_images_comes_back(tmp_path):
    model = small_model(in_channels=1, param_dtype="bfloat16")
    saving.save_model(model, tmp_path / "model")
    loaded = tnt_jax.load_model(tmp_path / "model")
    assert loaded.head.kernel[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded.head.kernel[...], model.head.kernel[...])
    assert described.description_of(loaded).preprocessing.mean == (0.5,)


def test_a_model_is_computed_in_the_dtype_that_is_asked_for(folder):
    loaded = tnt_jax.load_model(folder, dtype="bfloat16")
    assert (loaded.config.dtype, loaded.config.param_dtype) == ("bfloat16", "float32")
    assert loaded.embed(jnp.zeros((1, 32, 32, 3)))[1].dtype == jnp.bfloat16
    assert loaded.head.kernel[...].dtype == jnp.float32
    with pytest.raises(InputError, match="float64"):
        tnt_jax.load_model(folder, dtype="float64")


def test_saving_a_loaded_model_keeps_its_class_names(folder, tmp_path):
    saving.save_model(tnt_jax.load_model(folder), tmp_path / "again")
    assert described.read_description(tmp_path / "again").class_names == NAMES


def test_a_flipped_bit_is_found_and_its_parameter_named(folder):
    largest = max((folder / "parameters").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    damaged = bytearray(largest.read_bytes())
    description = json.loads((folder / "model.json").read_text())
    name = "blocks.0.outer.mlp.fc1.kernel"
    description["checksums"][name] = "00000000"
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=rf"parameters is damaged: the checksum is wrong of {name}$"):
        tnt_jax.load_model(folder)
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    with pytest.raises(InputError, match=r"is damaged|cannot be read"):
        tnt_jax.load_model(folder)


def test_a_truncated_file_is_an_input_error(folder):
    largest = max((folder / "parameters").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        tnt_jax.load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(format=2), "has format 2, and this version of tnt_jax reads format 1"),
        (lambda fields: fields.pop("config"), "is damaged: KeyError"),
        (lambda fields: fields["config"].update(outer_heads=5), "outer_dim 12 cannot be divided among outer_heads 5"),
        (lambda fields: fields["checksums"].pop("norm.bias"), r"its checksums and its model differ in norm\.bias"),
        (lambda fields: fields.update(checksums=None), "has no parameters, only the description"),
    ],
)
def test_a_wrong_description_is_an_input_error(folder, change, message):
    fields = json.loads((folder / "model.json").read_text())
    change(fields)
    (folder / "model.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        tnt_jax.load_model(folder)


def test_what_is_no_model_is_not_loaded_and_not_overwritten(model, folder, tmp_path):
    with pytest.raises(InputError, match="model exists"):
        saving.save_model(model, folder)
    saving.save_model(model, folder, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(InputError, match="it is no model, and is not overwritten"):
        saving.save_model(model, tmp_path / "photos", overwrite=True)


def test_nothing_half_written_stays(model, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving.ocp.Checkpointer, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        saving.save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_as_many_class_names_as_classes(model, tmp_path):
    with pytest.raises(InputError, match="there are 2 class names for a model with 3 classes"):
        saving.save_model(model, tmp_path / "model", class_names=NAMES[:2])
    assert list(tmp_path.iterdir()) == []


def test_a_description_without_parameters_is_written_and_read_alone(model, tmp_path):
    preprocessing = described.Preprocessing((32, 32), 1.0, (0.1,) * 3, (0.3,) * 3)
    description = described.describe(model.config, class_names=NAMES, preprocessing=preprocessing)
    described.write_description(tmp_path, description)
    assert described.read_description(tmp_path) == dataclasses.replace(description)


def again(model, folder, **options):
    """Saved and loaded."""
    saving.save_model(model, folder, **options)
    return tnt_jax.load_model(folder)


def test_parameters_that_were_cast_come_back_as_they_are(tmp_path):
    graph, state = nnx.split(small_model())
    cast = nnx.merge(graph, jax.tree.map(lambda value: value.astype(jnp.bfloat16), state))
    loaded = again(cast, tmp_path / "model")
    assert loaded.config.param_dtype == "bfloat16"
    np.testing.assert_array_equal(loaded.head.kernel[...], cast.head.kernel[...])


def test_numpys_numbers_in_a_configuration_come_back_as_pythons(tmp_path):
    numbers = {"num_classes": np.int64(3), "drop_path_rate": np.float32(0.25), "image_size": np.array([32, 48])}
    model = fresh_model("tnt_ti_patch16_224", **SMALL, **numbers)
    config = again(model, tmp_path / "model").config
    assert (config.num_classes, config.drop_path_rate, config.image_size) == (3, 0.25, (32, 48))
    assert {type(value) for value in (config.num_classes, *config.image_size)} == {int}


def test_another_head_is_saved_with_its_own_classes(folder, tmp_path):
    model = tnt_jax.load_model(folder)
    model.head = nnx.Linear(12, 7, rngs=nnx.Rngs(0))
    assert described.description_of(model).class_names is None
    assert again(model, tmp_path / "nameless").config.num_classes == 7
    names = tuple("abcdefg")
    assert described.description_of(again(model, tmp_path / "named", class_names=names)).class_names == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(
                model, "head", nnx.Sequential(nnx.Linear(12, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
            ),
            r"head\.layers\.0\.kernel \(12, 5\) is not in such a model",
        ),
        (
            lambda model: setattr(model, "norm", nnx.LayerNorm(5, rngs=nnx.Rngs(0))),
            r"norm\.bias is \(5,\), and should",
        ),
        (
            lambda model: model.norm.bias.set_value(jnp.zeros(12, jnp.float16)),
            r"norm\.bias is float16, and should",
        ),
    ],
)
def test_a_module_of_another_form_is_refused_before_anything_is_written(change, message, tmp_path):
    model = small_model()
    change(model)
    with pytest.raises(InputError, match=message):
        saving.save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({0: "ant", 1: "bee", 2: "cat"}, NAMES),
        ({"2": "cat", "0": "ant", "1": "bee"}, NAMES),
        (np.array(NAMES), NAMES),
        (iter(NAMES), NAMES),
        ({0: "ant", 2: "cat", 3: "bee"}, "should have each number from 0 to 2"),
        ("ant", "should be a list of texts"),
        (range(3), "class names have 0, and each should be a text"),
        (["ant", "", "cat"], "class names have '', and each should be a text"),
        (3, "class names are 3, and should be a list of texts"),
    ],
)
def test_names_of_classes_are_texts_in_any_collection(names, expected, model, tmp_path):
    if isinstance(expected, tuple):
        assert described.description_of(again(model, tmp_path / "model", class_names=names)).class_names == expected
        return
    with pytest.raises(InputError, match=expected):
        saving.save_model(model, tmp_path / "model", class_names=names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ant\nbee\n\ncat \n", NAMES),
        ('["ant", "bee", "cat"]', NAMES),
        ('{"0": "ant", "1": "bee", "2": "cat"}', NAMES),
        ("\n", "has no class names"),
        ("[1, 2]", "each should be a text"),
        ("{", "class names cannot be read"),
    ],
)
def test_names_of_classes_from_a_file(text, expected, tmp_path):
    (tmp_path / "names").write_text(text)
    if isinstance(expected, tuple):
        assert read_class_names(tmp_path / "names") == expected
        return
    with pytest.raises(InputError, match=expected):
        read_class_names(tmp_path / "names")


@pytest.mark.parametrize(
    ("feeding", "message"),
    [
        ({"std": [0, 0, 0]}, "std is .*, and each should be above 0 and at most 1"),
        ({"mean": [127.5] * 3}, "pixels lie between 0 and 1, so divide it by 255"),
        ({"mean": [0.5, 0.5]}, "mean is .*, and should be one number for each of 3 channels"),
        ({"mean": [math.nan] * 3}, "mean is"),
        ({"crop": 0}, "crop is 0, and should be a share of the image"),
        ({"crop": 87.5}, "crop is 87.5"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'; known are bicubic, bilinear"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused_on_writing_and_on_reading(feeding, message, model, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        saving.save_model(model, tmp_path / "other", **feeding)
    fields = json.loads((folder / "model.json").read_text())
    fields["preprocessing"] |= feeding
    (folder / "model.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=rf"model\.json: .*{message}"):
        tnt_jax.load_model(folder)


def test_what_json_cannot_hold_is_refused_and_numpys_numbers_are_taken(model, tmp_path):
    loaded = again(model, tmp_path / "model", source={"top1": np.float32(0.5), "file": tmp_path})
    assert described.description_of(loaded).source == {"top1": 0.5, "file": str(tmp_path)}
    with pytest.raises(InputError, match="cannot be written as JSON: set"):
        saving.save_model(model, tmp_path / "other", source={"tags": {1}})


@pytest.mark.parametrize("of_run", ["checkpoints/100/data", "metrics.jsonl", "config.json", "tensorboard/events"])
def test_a_run_is_never_overwritten(of_run, folder, model):
    (folder / of_run).parent.mkdir(parents=True, exist_ok=True)
    (folder / of_run).write_text("{}")
    with pytest.raises(InputError, match="holds a training run, and is not overwritten"):
        saving.save_model(model, folder, overwrite=True)
    assert (folder / of_run).exists()


def test_the_old_model_stays_where_the_new_one_cannot_take_its_place(folder, model, monkeypatch):
    before = described.read_description(folder)
    replace = Path.replace

    def fail(path, target):
        if "unfinished" in str(path):
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="cannot be written"):
        saving.save_model(model, folder, overwrite=True, class_names=("x", "y", "z"))
    assert described.read_description(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_overwriting_touches_nothing_that_is_not_ours(model, folder, tmp_path):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"model also holds notes\.txt, which would be lost"):
        saving.save_model(model, folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (tmp_path / "link").symlink_to(folder)
    saving.save_model(model, tmp_path / "link", overwrite=True, class_names=("x", "y", "z"))
    assert (tmp_path / "link").is_symlink()
    assert described.read_description(folder).class_names == ("x", "y", "z")


def test_two_writers_of_one_number_do_not_meet_and_a_link_laid_there_is_not_followed(tmp_path, monkeypatch):
    """In containers on one disk every process has the number 1."""
    monkeypatch.setattr("os.getpid", lambda: 1)

    def first(path):
        path.mkdir()
        (path / "one").write_text("first")
        write_whole(tmp_path / "shared", second)
        (path / "two").write_text("first")

    def second(path):
        path.mkdir()
        (path / "one").write_text("second")

    write_whole(tmp_path / "shared", first)
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["one", "two"]
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_what_is_written_has_the_mode_that_the_umask_gives(model, tmp_path):
    before = os.umask(0o027)
    try:
        saving.save_model(model, tmp_path / "model")
        publish(model, tmp_path / "hub")
        export(model, tmp_path / "a.safetensors", "timm")
        export(model, tmp_path / "a.pth", "timm")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("name", ["w[0]", "[2026]/w", "a*b/w", "lr=[1e-3]?"])
def test_a_path_may_look_like_a_pattern(name, model, tmp_path):
    saving.save_model(model, tmp_path / name)
    shutil.move(tmp_path / name, tmp_path / "plain")
    for folder in (tmp_path / "plain", shutil.copytree(tmp_path / "plain", tmp_path / "x[y]" / "copy")):
        np.testing.assert_array_equal(tnt_jax.load_model(folder).head.kernel[...], model.head.kernel[...])


def test_an_address_is_no_destination(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for destination in ("gs://bucket/model", "az://a/b"):
        with pytest.raises(InputError, match="is an address, and what is written lies on a disk"):
            saving.save_model(model, destination)
    assert list(tmp_path.iterdir()) == []


def test_raw_weights_are_asked_of_what_has_two_alone(folder):
    with pytest.raises(InputError, match=r"raw weights were asked for, and .* is a model folder"):
        tnt_jax.load_model(folder, weights="raw")


def test_a_description_of_more_blocks_than_tensors_is_refused_before_a_model_is_built(folder, monkeypatch):
    fields = json.loads((folder / "model.json").read_text())
    fields["config"]["depth"] = 3000
    (folder / "model.json").write_text(json.dumps(fields))
    monkeypatch.setattr(saving, "abstract_model", lambda _: pytest.fail("it was built"))
    with pytest.raises(InputError, match="a model of 3,000 blocks is described, and there are 42 tensors"):
        tnt_jax.load_model(folder)


def test_an_error_without_a_text_is_a_message_too(folder, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(saving.ocp.Checkpointer, "restore", fail)
    with pytest.raises(InputError, match="cannot be read: MemoryError"):
        tnt_jax.load_model(folder)


def test_a_full_disk_is_one_message_and_leaves_nothing(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"it takes 18,892 bytes, and 1,000 are free on the disk"):
        saving.save_model(model, tmp_path / "deep" / "model")
    monkeypatch.undo()

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(saving.ocp.Checkpointer, "save", full)
    with pytest.raises(InputError, match="cannot be written: RESOURCE_EXHAUSTED: No space left on device"):
        saving.save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
