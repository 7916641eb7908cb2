"""Checkpoints as trainers leave them: wrapped, prefixed, averaged, under any name."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from small_models import small_model
from state_dicts import as_torch, state_dict

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.storage.description import description_of
from tnt_jax.storage.folder import model_parameters
from tnt_jax.storage.load import open_model
from tnt_jax.storage.torch.layouts import tensor_names
from tnt_jax.storage.torch.read import read_file
from tnt_jax.storage.torch.write import export


@pytest.fixture(scope="module")
def raw():
    return as_torch(state_dict("timm", "tnt_ti_patch16_224", image_size=32, num_classes=10))


@pytest.fixture(scope="module")
def mm():
    return as_torch(state_dict("mmpretrain", "tnt_ti_legacy_patch16_224", image_size=32, num_classes=10))


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def class_token(found):
    (name,) = [name for name in found.tensors if name.endswith("cls_token")]
    return float(found.tensors[name].numpy().ravel()[0])


class HistoryBuffer:
    """Of mmengine, which every checkpoint of mmpretrain's own training has beside the weights."""


WRAPPED = {
    "as it is": lambda raw: raw,
    "model_state_dict": lambda raw: {"epoch": 1, "model_state_dict": raw, "optimizer_state_dict": {}, "loss": 0.1},
    "net": lambda raw: {"net": raw, "acc": 1.0},
    "params": lambda raw: {"params": raw},
    "module": lambda raw: {"module": raw, "ds_version": "0.14"},
    "lightning": lambda raw: {"state_dict": under("model.", raw), "pytorch-lightning_version": "2.4", "callbacks": {}},
    "ddp twice": lambda raw: under("module.module.", raw),
    "compiled": lambda raw: {"model": under("_orig_mod.module.", raw)},
    "a net in a trainer": lambda raw: {"trainer": {"student": {"weights": under("net.encoder.", raw)}}},
    "numbers of NumPy": lambda raw: {"state_dict": raw, "best_acc": np.float64(81.5), "curve": np.ones(3)},
    "arguments": lambda raw: {"model": raw, "args": argparse.Namespace(out=Path("o"), lr=0.1)},
    "mmengine": lambda raw: {"meta": {}, "state_dict": raw, "message_hub": {"log": HistoryBuffer()}},
    "flat with numbers": lambda raw: {**raw, "epoch": 3, "name": "tnt"},
    "keys that are numbers": lambda raw: {"state_dict": raw, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_tnt_is_found_in_any_wrapper(kind, raw, tmp_path):
    torch.save(WRAPPED[kind](raw), tmp_path / "a.pth")
    opened = open_model(tmp_path / "a.pth")
    assert (opened.layout, opened.description.config.name) == ("timm", "tnt_ti_patch16_224")
    np.testing.assert_array_equal(opened.parameters["class_token"], raw["cls_token"])


def test_mmpretrains_backbone_alone_and_in_a_detector_is_found(mm, tmp_path):
    backbone = {name.removeprefix("backbone."): value for name, value in mm.items() if name.startswith("backbone.")}
    for prefix in ("", "backbone.", "model.backbone."):
        torch.save({"state_dict": under(prefix, backbone)}, tmp_path / "a.pth")
        opened = open_model(tmp_path / "a.pth")
        assert (opened.layout, opened.description.config.num_classes) == ("mmpretrain", 0)


def test_a_whole_pickled_module_is_read_without_its_code(tmp_path):
    import pickled_module

    torch.save(pickled_module.whole(), tmp_path / "a.pth")
    np.testing.assert_array_equal(open_model(tmp_path / "a.pth").parameters["class_token"], np.full((1, 1, 192), 2.0))


@pytest.mark.parametrize("names", [("model", "best", "ema"), ("a", "b", "c", "d", "e", "ema")])
def test_of_many_pickled_modules_every_one_is_seen(names, tmp_path, caplog):
    import pickled_module

    modules = {name: pickled_module.whole() for name in names}
    with torch.no_grad():
        modules["ema"].cls_token.fill_(7.0)
    torch.save(modules, tmp_path / "a.pth")
    assert class_token(read_file(tmp_path / "a.pth")) == 7.0
    others = ", ".join(names[:-1])
    assert f"holds several networks: ema, which is averaged, is read, and not {others}" in caplog.text
    assert class_token(read_file(tmp_path / "a.pth", "raw")) == 2.0


@pytest.mark.parametrize("other", ["swap_out", "unaveraged", "dreamteacher2"])
def test_a_name_that_contains_a_word_for_an_average_is_none(other, raw, tmp_path, caplog):
    torch.save(
        {"net": raw, other: under("module.", {name: tensor + 1 for name, tensor in raw.items()})}, tmp_path / "a"
    )
    found = read_file(tmp_path / "a")
    assert (found.place, found.averaged) == ("net", False)
    assert f"net is read, and not {other}/module." in caplog.text


AVERAGED = {
    "timm": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema},
    "in a wrapper": lambda raw, ema: {"model": raw, "ema": {"module": under("module.", ema), "decay": 0.9}},
    "teacher": lambda raw, ema: {"student": raw, "teacher": ema},
    "side by side": lambda raw, ema: {"state_dict": under("model.", raw) | under("model_ema.module.", ema)},
    "swa": lambda raw, ema: {"model": raw, "swa_model": under("module.", ema) | {"n_averaged": torch.tensor(3)}},
    # mmengine exchanges them when it saves.
    "mmengine": lambda raw, ema: {
        "state_dict": ema,
        "ema_state_dict": under("module.", raw) | {"steps": torch.tensor(7)},
    },
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_are_taken_unless_raw_ones_are_asked_for(kind, raw, tmp_path):
    ema = {name: tensor + 1 for name, tensor in raw.items()}
    torch.save(AVERAGED[kind](raw, ema), tmp_path / "a.pth")
    token = float(raw["cls_token"].ravel()[0])
    assert class_token(read_file(tmp_path / "a.pth")) == pytest.approx(token + 1)
    assert class_token(read_file(tmp_path / "a.pth", "ema")) == pytest.approx(token + 1)
    assert class_token(read_file(tmp_path / "a.pth", "raw")) == pytest.approx(token)
    open_model(tmp_path / "a.pth", weights="raw")


@pytest.mark.parametrize("name", ["a.ckpt", "a.PTH", "a.tar", "last.pth.tar", "checkpoint", "a.bin", "a.model"])
def test_files_are_known_by_their_content(name, raw, tmp_path):
    torch.save({"state_dict": raw}, tmp_path / name)
    assert open_model(tmp_path / name).layout == "timm"
    safetensors.torch.save_file(raw, tmp_path / name)
    assert open_model(tmp_path / name).layout == "timm"


OTHERS = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a git-lfs pointer to the file",
    "<!DOCTYPE html><html>Sign in</html>": "is a web page, not a checkpoint",
    '{"weights": 1}': "is JSON, not a checkpoint",
    "\x1f\x8b\x08": "is compressed with gzip",
    "\x89HDF\r\n": "is an HDF5 file",
    "\x80\x04N.": "is a pickle that torch.save did not write",
    "": "is empty",
    "anything": "is no checkpoint: neither safetensors nor a file that torch.save wrote",
}


@pytest.mark.parametrize("text", OTHERS)
def test_what_is_no_checkpoint_is_named(text, tmp_path):
    (tmp_path / "a.pth").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=OTHERS[text]):
        open_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda value: value.to("meta"),
            r"norm\.bias is without data .on the device meta., and should",
        ),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), r"norm\.bias is quantised"),
        (lambda value: value.to_sparse(), r"norm\.bias is sparse"),
        (lambda value: value.to(torch.float8_e4m3fn), r"norm\.bias is float8_e4m3fn, and should be of floating point"),
        (lambda value: value.int(), r"norm\.bias is int32"),
        (lambda value: value.numpy(), r"norm\.bias is <numpy.*reconstruct>, and should be a tensor"),
        (lambda value: value.numpy().tolist(), r"norm\.bias is a list, and should be a tensor"),
    ],
)
def test_tensors_that_cannot_be_weights_are_named(change, message, raw, tmp_path):
    torch.save({**raw, "norm.bias": change(raw["norm.bias"])}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=message):
        open_model(tmp_path / "a.pth")


def test_a_float8_safetensors_is_refused_and_names_that_are_numbers_are(raw, tmp_path):
    safetensors.torch.save_file({name: value.to(torch.float8_e5m2) for name, value in raw.items()}, tmp_path / "a")
    with pytest.raises(InputError, match=r"cls_token is float8_e5m2"):
        open_model(tmp_path / "a")
    torch.save({"state_dict": {0: torch.ones(1), 1: torch.ones(2)}}, tmp_path / "a")
    with pytest.raises(InputError, match="names its tensors 0, 1, and a state dict names them with texts"):
        open_model(tmp_path / "a")


@pytest.mark.parametrize("number", [1e300, -1e39])
def test_a_number_that_float32_does_not_have_is_refused(number, raw, tmp_path):
    torch.save({**raw, "norm.bias": torch.full_like(raw["norm.bias"], number, dtype=torch.float64)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"norm\.bias has values that are not finite in float32"):
        open_model(tmp_path / "a.pth")


def test_a_strange_tensor_beside_the_network_is_named(raw, tmp_path):
    torch.save({"state_dict": under("model.", raw) | {"criterion.weight": torch.ones(3)}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"criterion\.weight \(3,\) is not in this model"):
        open_model(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["mmengine", "mmcv"])
def test_classes_that_a_checkpoint_names_are_the_models(kind, mm, tmp_path):
    names = [f"animal {number}" for number in range(10)]
    meta = {"dataset_meta": {"classes": names}} if kind == "mmengine" else {"CLASSES": tuple(names)}
    torch.save({"meta": meta, "state_dict": mm}, tmp_path / "a.pth")
    assert open_model(tmp_path / "a.pth").description.class_names == tuple(names)


def test_a_thousand_classes_of_ones_own_get_no_names_and_those_of_a_published_file_do(tmp_path):
    tensors = as_torch(state_dict("huawei", "tnt_ti_patch16_224", image_size=32))
    torch.save(tensors, tmp_path / "mine.pth")
    opened = open_model(tmp_path / "mine.pth")
    assert opened.description.class_names is None
    assert "--class-names imagenet-1k" in opened.notes[-1]
    (tmp_path / "mine.pth").rename(tmp_path / "tnt_s_81.5.pth.tar")
    assert open_model(tmp_path / "tnt_s_81.5.pth.tar").description.class_names[0] == "tench, Tinca tinca"


MODELS = {
    "official": {},
    "bfloat16": {"param_dtype": "bfloat16"},
    "legacy": {"architecture": "legacy"},
    "grey": {"in_channels": 1, "image_size": (32, 48)},
    "squeeze and excitation": {"squeeze_excitation": True},
    "no positions": {"word_positions": False, "sentence_positions": False},
    "one inner block": {"depth": 2, "inner_blocks": (1,)},
    "no head": {"num_classes": 0},
    "wide": {"mlp_ratio": 2.5, "word_stride": 8},
}

REFUSED = {(kind, "mmpretrain") for kind in MODELS if kind != "legacy"}
REFUSED |= {("legacy", "huawei"), ("squeeze and excitation", "timm")}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", ["huawei", "timm", "mmpretrain"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_variant_comes_back_from_every_layout_or_is_refused_when_written(kind, layout, suffix, tmp_path):
    model = small_model(**MODELS[kind])
    path = tmp_path / f"a{suffix}"
    if (kind, layout) in REFUSED:
        with pytest.raises(InputError, match=f"{layout} has no"):
            export(model, path, layout)
        assert list(tmp_path.iterdir()) == []
        return
    export(model, path, layout)
    opened = open_model(path)
    assert opened.description == description_of(model)
    for name, value in model_parameters(model).items():
        np.testing.assert_array_equal(opened.parameters[name], value, err_msg=name)


def test_layouts_refuse_modules_that_they_lack_by_name(tmp_path):
    with pytest.raises(InputError, match=r"timm has no place for blocks\.0\.outer\.se\."):
        export(small_model(squeeze_excitation=True), tmp_path / "a.safetensors", "timm")


def test_a_parameter_at_the_top_that_a_layout_lacks_is_refused_by_name():
    with pytest.raises(InputError, match="timm has no place for registers"):
        tensor_names("registers", "timm")


@pytest.mark.parametrize("name", ["tnt_ti_patch16_224", "ptnt_ti_patch16_192"])
def test_squeeze_and_excitation_is_recognised_by_its_names(name, tmp_path):
    tensors = state_dict("huawei", name, squeeze_excitation=True, num_classes=10)
    torch.save(as_torch(tensors), tmp_path / "a.pth")
    config = open_model(tmp_path / "a.pth").description.config
    assert (config.squeeze_excitation, config.num_classes) == (True, 10)
    tnt_jax.save_model(tnt_jax.load_model(tmp_path / "a.pth"), tmp_path / "model")
    export(tnt_jax.load_model(tmp_path / "model"), tmp_path / "b.pth", "huawei")
    for key, tensor in torch.load(tmp_path / "b.pth").items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)


def test_what_we_write_is_what_torch_reads(tmp_path):
    model = small_model()
    export(model, tmp_path / "a.pth", "timm")
    export(model, tmp_path / "a.safetensors", "timm")
    theirs, ours = torch.load(tmp_path / "a.pth", mmap=True), safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert list(theirs) == list(ours) or theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, ours[name])
    assert tnt_jax.load_model(tmp_path / "a.pth").config == model.config
