"""What earlier versions wrote is read for ever; what a later one writes is said to be that, and nothing is touched.

`tests/golden/version_COMMIT.zip` was written by the code of that commit: `run`, a tiny run of digits of one epoch;
`model`, what `save_model` made of it; `logits.json`, what both gave for the images below.
"""

import contextlib
import json
import shutil
import zipfile

import jax
import numpy as np
import pytest
from published import GOLDEN
from small_runs import contents

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.storage.checkpoint import Checkpoints
from tnt_jax.storage.reading import DamagedError, LayoutError, VersionError, description_crc, restore

VERSIONS = sorted(path.stem.removeprefix("version_") for path in GOLDEN.glob("version_*.zip"))


@pytest.fixture(params=VERSIONS)
def folder(request, tmp_path):
    with zipfile.ZipFile(GOLDEN / f"version_{request.param}.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_there_are_versions():
    assert {"098ec0d", "f55bcf1"} <= set(VERSIONS)


@pytest.mark.parametrize("model", ["model", "ema", "raw"])
def test_a_model_and_a_run_of_an_earlier_version_give_its_logits(model, folder):
    expected = json.loads((folder / "logits.json").read_text())[model]
    before = contents(folder)
    loaded = (
        tnt_jax.load_model(folder / "model") if model == "model" else tnt_jax.load_model(folder / "run", weights=model)
    )
    images = np.random.default_rng(0).standard_normal((3, 16, 16, 1)).astype(np.float32)
    np.testing.assert_allclose(loaded(images), expected, atol=1e-5)
    assert contents(folder) == before


def like(folder):
    """The parameters that a run's checkpoint has, as shapes on one device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model = tnt_jax.load_model(folder / "run", weights="raw")
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree_of(model))
    return {"params": tree}


def tree_of(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model))


def test_a_run_of_an_earlier_version_goes_on_where_it_was_and_another_model_is_another_layout(folder):
    wanted = like(folder)
    with contextlib.closing(Checkpoints(folder / "run")) as checkpoints:
        step, trees = checkpoints.restore_latest(wanted)
    assert step == 11
    assert jax.tree.structure(trees) == jax.tree.structure(wanted)
    fewer = {"params": {name: tree for name, tree in wanted["params"].items() if name != "head"}}
    with pytest.raises(LayoutError, match="has another layout: in params, "):
        restore(folder / "run", 11, fewer)


def later(description):
    description["format"] = 2


def without_a_field(description):
    del description["least_alone"]


@pytest.mark.parametrize("change", [later, without_a_field, dict.clear])
def test_a_checkpoint_of_another_version_is_said_to_be_that_and_nothing_is_touched(change, tmp_path):
    with zipfile.ZipFile(GOLDEN / "version_f55bcf1.zip") as archive:
        archive.extractall(tmp_path)
    wanted, step = like(tmp_path), tmp_path / "run/checkpoints/11"
    fields = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    change(fields["custom_metadata"])
    fields["custom_metadata"]["crc32"] = description_crc(fields["custom_metadata"])
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(fields))
    noted = step.with_name("11.files.json")
    checksums = noted.read_text()
    noted.unlink()
    before = contents(tmp_path)
    with (
        contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints,
        pytest.raises(
            VersionError, match=r"step 11 .* was written by another version of tnt_jax\. Nothing was touched"
        ),
    ):
        checkpoints.restore_latest(wanted)
    with pytest.raises(InputError, match="another version"):
        tnt_jax.load_model(tmp_path / "run")
    assert contents(tmp_path) == before
    noted.write_text(checksums)  # by which the same is damage
    with pytest.raises(DamagedError, match="_CHECKPOINT_METADATA"):
        restore(tmp_path / "run", 11, wanted)


def test_a_model_of_another_version_is_said_to_be_that(tmp_path):
    with zipfile.ZipFile(GOLDEN / "version_f55bcf1.zip") as archive:
        archive.extractall(tmp_path)
    path = tmp_path / "model/model.json"
    text = path.read_text()
    for part, change, message in (
        ("config", {"registers": 4}, "ModelConfig has no field registers; this was written by another version"),
        ("config", {"depth": None}, "ModelConfig needs the field depth; this was written by another version"),
        ("preprocessing", {"gamma": 2}, "Preprocessing has no field gamma; this was written by another version"),
        ("outputs", {"calibration": 2}, "Outputs has no field calibration; this was written by another version"),
    ):
        fields = json.loads(text)
        fields[part] = {name: value for name, value in (fields[part] | change).items() if name != "depth" or value}
        path.write_text(json.dumps(fields))
        with pytest.raises(InputError, match=message):
            tnt_jax.load_model(tmp_path / "model")


def test_the_best_step_of_a_run_whose_configuration_has_another_field_is_found(tmp_path):
    with zipfile.ZipFile(GOLDEN / "version_f55bcf1.zip") as archive:
        archive.extractall(tmp_path)
    run = tmp_path / "run"
    fields = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(fields | {"a_field_of_next_year": 1}))
    shutil.copytree(run / "checkpoints/11", run / "checkpoints/12")
    assert tnt_jax.load_model(run).description.source["step"] == 11
