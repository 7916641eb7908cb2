import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_model

from tnt_jax.config import InputError
from tnt_jax.storage import folder as saving

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(model, tmp_path):
    saving.save_model(model, tmp_path / "model", class_names=NAMES, source={"file": "a.pth"})
    return tmp_path / "model"


def test_a_saved_model_comes_back_bit_for_bit_with_its_description(model, folder):
    loaded = saving.load_folder(folder)
    before, after = saving.model_parameters(model), saving.model_parameters(loaded)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert loaded.config == model.config
    description = saving.description_of(loaded)
    assert description.class_names == NAMES
    assert description.source == {"file": "a.pth"}
    assert (description.preprocessing.image_size, description.preprocessing.crop) == ((32, 32), 0.9)


def test_a_bfloat16_model_of_grey_images_comes_back(tmp_path):
    model = small_model(in_channels=1, param_dtype="bfloat16")
    saving.save_model(model, tmp_path / "model")
    loaded = saving.load_folder(tmp_path / "model")
    assert loaded.head.kernel[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded.head.kernel[...], model.head.kernel[...])
    assert saving.description_of(loaded).preprocessing.mean == (0.5,)


def test_saving_a_loaded_model_keeps_its_class_names(folder, tmp_path):
    saving.save_model(saving.load_folder(folder), tmp_path / "again")
    assert saving.read_description(tmp_path / "again").class_names == NAMES


def test_a_flipped_bit_is_found_and_its_parameter_named(folder):
    largest = max((folder / "parameters").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    damaged = bytearray(largest.read_bytes())
    description = json.loads((folder / "model.json").read_text())
    name = "blocks.0.outer.mlp.fc1.kernel"
    description["checksums"][name] = "00000000"
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=rf"parameters is damaged: the checksum is wrong of {name}$"):
        saving.load_folder(folder)
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    with pytest.raises(InputError, match=r"is damaged|cannot be read"):
        saving.load_folder(folder)


def test_a_truncated_file_is_an_input_error(folder):
    largest = max((folder / "parameters").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        saving.load_folder(folder)


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
        saving.load_folder(folder)


def test_what_is_no_model_is_not_loaded_and_not_overwritten(model, folder, tmp_path):
    with pytest.raises(InputError, match=r"nowhere is not a model: it has no model\.json"):
        saving.load_folder(tmp_path / "nowhere")
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
    preprocessing = saving.Preprocessing((32, 32), 1.0, (0.1,) * 3, (0.3,) * 3)
    description = saving.describe(model.config, class_names=NAMES, preprocessing=preprocessing)
    saving.write_description(tmp_path, description)
    assert saving.read_description(tmp_path) == dataclasses.replace(description)
