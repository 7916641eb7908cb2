"""convert_torch_weights.py, on small state dicts whose shapes are those of the published layouts."""

import argparse
import json

import commands
import numpy as np
import published
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from small_models import small_model, small_pyramid
from state_dicts import as_torch, save_safetensors, state_dict

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.data.classes import read_class_names
from tnt_jax.models.variants import VARIANTS, model_config
from tnt_jax.storage.convert import convert
from tnt_jax.storage.folder import model_parameters, parameter_shapes
from tnt_jax.storage.torch.layouts import layout_shapes
from tnt_jax.storage.torch.read import read_file, recognise_config, recognise_layout, to_parameters
from tnt_jax.storage.torch.write import export

# TNT-Ti is the smallest model whose shapes are recognised.
SOURCES = {
    "huawei": ("huawei", "tnt_ti_patch16_224"),
    "timm": ("timm", "tnt_ti_patch16_224"),
    "timm_legacy": ("timm", "tnt_ti_legacy_patch16_224"),
    "mmpretrain": ("mmpretrain", "tnt_ti_legacy_patch16_224"),
    "huawei_pyramid": ("huawei", "ptnt_ti_patch16_192"),
}


@pytest.fixture(scope="module")
def tensors():
    return {name: state_dict(*source) for name, source in SOURCES.items()}


def loaded(folder):
    return {path: np.asarray(value) for path, value in model_parameters(tnt_jax.load_model(folder)).items()}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_to_a_model_and_back_is_the_identity_bit_for_bit(source, suffix, tensors, tmp_path):
    layout, name = SOURCES[source]
    path = tmp_path / f"source{suffix}"
    torch.save(as_torch(tensors[source]), path) if suffix == ".pth" else save_safetensors(tensors[source], path)
    code, out, err = commands.run("convert_torch_weights.py", path, tmp_path / "model")
    assert (code, err) == (0, "")
    for line in (
        f"layout        {layout}",
        f"architecture  {VARIANTS[name].config.architecture}",
        f"variant       {name}",
        "image size    192x192" if source == "huawei_pyramid" else "image size    224x224",
        "classes       1000",
        f"tensors read  {len(tensors[source])}, every one accounted for",
    ):
        assert line in out
    assert ("outer_tokens was left out" in out) == (source == "huawei")
    assert out.count("num_batches_tracked was left out") == (5 if source == "huawei_pyramid" else 0)

    back = tmp_path / f"back{suffix}"
    code, out, err = commands.run("convert_torch_weights.py", tmp_path / "model", back, "--to", layout)
    assert (code, err) == (0, "")
    written = torch.load(back) if suffix == ".pth" else safetensors.numpy.load_file(back)
    assert written.keys() == tensors[source].keys()
    for key, tensor in tensors[source].items():
        np.testing.assert_array_equal(np.asarray(written[key]), tensor, err_msg=key)


def test_a_pyramids_position_tables_are_resized_over_queries_and_keys(tmp_path):
    tensors = state_dict("huawei", "ptnt_ti_patch16_192", image_size=64, num_classes=10)
    rows = np.repeat(np.arange(8) + 0.5, 8)
    # How far each query lies below each key, whatever their columns are: more columns change nothing of it.
    tensors["stages.0.relative_pos"] = np.zeros((1, 2, 64, 4), np.float32)
    tensors["stages.0.relative_pos"][0, 1] = rows[:, None] - 4 * np.array([0.5, 0.5, 1.5, 1.5])
    checkpoint = save_safetensors(tensors, tmp_path / "a.safetensors")
    for size in ("64", "64x128"):
        arguments = (checkpoint, tmp_path / size, "--num-classes", "10", "--image-size", size)
        code, out, err = commands.run("convert_torch_weights.py", *arguments)
        assert (code, err) == (0, "")
        assert ("were resized from images of 64x64 to 64x128" in out) == (size != "64")
    same, wide = loaded(tmp_path / "64"), loaded(tmp_path / "64x128")
    for stage in range(4):
        np.testing.assert_array_equal(same[f"stages.{stage}.position_bias"], tensors[f"stages.{stage}.relative_pos"])
    np.testing.assert_array_equal(same["sentence_positions"], tensors["outer_pos"])
    table = wide["stages.0.position_bias"].reshape(2, 8, 16, 2, 4)
    assert not table[0].any()
    expected = (np.arange(8) + 0.5)[:, None, None, None] - 4 * np.array([0.5, 1.5])[:, None]
    np.testing.assert_allclose(table[1], np.broadcast_to(expected, (8, 16, 2, 4)), atol=1e-4)
    assert wide["stages.3.position_bias"].shape == (1, 8, 2, 2)
    assert wide["sentence_positions"].shape == (1, 128, 80)


def test_weights_of_one_family_are_not_given_to_the_other(small):
    pyramid = state_dict("huawei", "ptnt_ti_patch16_192", image_size=64)
    with pytest.raises(InputError, match="these are the weights of a PyramidTNT, and tnt_s_patch16_224 is a TNT"):
        to_parameters(pyramid, "huawei", model_config("tnt_s_patch16_224"))
    with pytest.raises(InputError, match="these are the weights of a TNT, and ptnt_s_patch16_256 is a PyramidTNT"):
        to_parameters(dict(small), "huawei", model_config("ptnt_s_patch16_256"))


def test_a_pyramid_with_squeeze_and_excitation_comes_back_from_huaweis_layout(tmp_path):
    tnt_jax.save_model(small_pyramid(squeeze_excitation=True, inner_blocks=(1,)), tmp_path / "a")
    export(tnt_jax.load_model(tmp_path / "a"), tmp_path / "a.safetensors", "huawei")
    convert(tmp_path / "a.safetensors", tmp_path / "b")
    assert tnt_jax.load_model(tmp_path / "b").config.inner_blocks == (1,)
    before, after = loaded(tmp_path / "a"), loaded(tmp_path / "b")
    assert "stages.3.blocks.0.outer.se.fc2.kernel" in before
    for path in before:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    with pytest.raises(InputError, match=r"timm has no PyramidTNT, .* it can go to huawei"):
        export(tnt_jax.load_model(tmp_path / "a"), tmp_path / "b.safetensors", "timm")


def test_the_folder_says_where_it_came_from_and_how_to_feed_it(tensors, tmp_path):
    path = save_safetensors(tensors["huawei"], tmp_path / "tnt.safetensors")
    assert "its classes have no names" in convert(path, tmp_path / "model").notes[-1]
    assert tnt_jax.load_model(tmp_path / "model").description.class_names is None
    convert(path, tmp_path / "model", class_names=read_class_names("imagenet-1k"), overwrite=True)
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    assert description["source"]["file"] == "tnt.safetensors"
    assert len(description["source"]["sha256"]) == 64
    assert description["preprocessing"] == {
        "image_size": [224, 224],
        "crop": 0.9,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "white": None,
    }
    names = description["class_names"]
    # The names that mmpretrain and timm print; 0, 388 and 999 are known to everybody.
    assert (names[0], names[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")
    assert names[388] == "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca"
    assert len(names) == 1000


def test_a_model_of_any_size_comes_back_from_safetensors(tmp_path):
    model = small_model(architecture="legacy", image_size=(16, 32), in_channels=1)
    tnt_jax.save_model(model, tmp_path / "a", class_names=["x", "y", "z"])
    export(tnt_jax.load_model(tmp_path / "a"), tmp_path / "a.safetensors", "mmpretrain")
    convert(tmp_path / "a.safetensors", tmp_path / "b")
    assert tnt_jax.load_model(tmp_path / "b").description == tnt_jax.load_model(tmp_path / "a").description
    before, after = loaded(tmp_path / "a"), loaded(tmp_path / "b")
    for path in before:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)


@pytest.mark.parametrize(
    ("wrap", "weights", "expected"),
    [
        (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema, "epoch": 3}, None, "ema"),
        (lambda raw, ema: {"model": raw, "model_ema": ema}, None, "ema"),
        (lambda raw, ema: {"model": ema, "state_dict": raw, "state_dict_ema": None}, None, "raw"),
        (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema}, "raw", "raw"),
        (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema}, "ema", "ema"),
        (lambda raw, ema: {"model": {f"module.{name}": raw[name] for name in raw}}, None, "raw"),
        (lambda raw, ema: {"args": argparse.Namespace(lr=0.1), "state_dict": raw, "optimizer": {}}, None, "raw"),
    ],
)
def test_checkpoints_are_unwrapped_in_timms_order(wrap, weights, expected, small, tmp_path):
    raw = as_torch(small)
    ema = {name: tensor + 1 for name, tensor in raw.items()}
    torch.save(wrap(raw, ema), tmp_path / "a.pth.tar")
    tensors = read_file(tmp_path / "a.pth.tar", weights).tensors
    assert tensors.keys() == small.keys()
    np.testing.assert_array_equal(tensors["cls_token"].numpy(), {"raw": raw, "ema": ema}[expected]["cls_token"])


def test_averaged_weights_that_are_not_there_are_refused(checkpoint):
    with pytest.raises(InputError, match="has no averaged weights, only raw ones: the file itself"):
        read_file(checkpoint, "ema")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(dtype, small, tmp_path):
    halves = {name: tensor.to(dtype) for name, tensor in as_torch(small).items()}
    torch.save(halves, tmp_path / "a.bin")
    safetensors.torch.save_file(halves, tmp_path / "a.safetensors")
    for file in ("a.bin", "a.safetensors"):
        tensors = read_file(tmp_path / file).tensors
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        parameters = to_parameters(tensors, "huawei", recognise_config("huawei", shapes))
        assert parameters["head.bias"].dtype == np.float32
        np.testing.assert_array_equal(parameters["head.bias"], halves["head.bias"].float())


@pytest.mark.parametrize("grid", [(24, 24), (12, 20), (7, 7), (14, 14)])
def test_sentence_positions_are_resized_as_timm_resizes_them(grid, small, tmp_path):
    record, _ = published.record("timm_position_resize")  # of 6 channels
    before, expected = (np.tile(record[name], (1, 1, 32)) for name in ("pos_14x14", "to_{}x{}".format(*grid)))
    checkpoint = save_safetensors(small | {"outer_pos": before}, tmp_path / "a.safetensors")
    size = "{}x{}".format(*(16 * side for side in grid))
    arguments = (checkpoint, tmp_path / "model", "--num-classes", "10", "--image-size", size)
    code, out, err = commands.run("convert_torch_weights.py", *arguments)
    assert (code, err) == (0, "")
    error = np.abs(loaded(tmp_path / "model")["sentence_positions"] - expected).max()
    assert error < 1e-6 * np.abs(expected).max()
    assert f"image size    {size}" in out
    assert ("were resized from images of 224x224" in out) == (grid != (14, 14))


def test_positions_of_no_square_need_their_image_size(small, tmp_path):
    wide = np.ones((1, 1 + 2 * 5, 192), np.float32)
    checkpoint = save_safetensors(small | {"outer_pos": wide}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="10 sentence positions are no square"):
        convert(checkpoint, tmp_path / "model", num_classes=10)
    done = convert(checkpoint, tmp_path / "model", num_classes=10, image_size=(32, 80))
    assert done.description.config.image_size == (32, 80)
    np.testing.assert_array_equal(loaded(tmp_path / "model")["sentence_positions"], wide)


def test_a_head_of_another_size_is_kept_left_out_or_made_fresh_on_request(checkpoint, small, tmp_path):
    assert convert(checkpoint, tmp_path / "kept").notes[1:] == ()
    np.testing.assert_array_equal(loaded(tmp_path / "kept")["head.bias"], small["head.bias"])

    assert "the head of 10 classes was left out" in convert(checkpoint, tmp_path / "none", num_classes=0).notes
    assert "head.bias" not in loaded(tmp_path / "none")

    notes = convert(checkpoint, tmp_path / "fresh", num_classes=37).notes
    assert "the head is fresh: 37 classes, where the checkpoint has 10" in notes
    fresh = loaded(tmp_path / "fresh")
    assert fresh["head.kernel"].shape == (192, 37)
    assert fresh["head.kernel"].std() == pytest.approx(0.02, rel=0.05)
    assert not fresh["head.bias"].any()
    np.testing.assert_array_equal(fresh["norm.bias"], small["norm.bias"])

    headless = {name: tensor for name, tensor in small.items() if not name.startswith("head")}
    checkpoint = save_safetensors(headless, tmp_path / "headless.safetensors")
    assert convert(checkpoint, tmp_path / "model").description.config.num_classes == 0


def test_the_table_names_every_tensor_of_the_published_state_dicts():
    for name in ("huawei_tnt_s", "timm_tnt_s", "timm_tnt_s_legacy", "mmpretrain_tnt_s", "huawei_ptnt_ti"):
        _, manifest = published.record(name)
        published_shapes = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
        layout = recognise_layout(published_shapes)
        assert layout == name.split("_")[0]
        config = recognise_config(layout, published_shapes)
        ours = {path: of.shape for path, of in parameter_shapes(config).items()}
        assert layout_shapes(ours, layout) == published_shapes
