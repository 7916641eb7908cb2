"""Names on the Hugging Face hub, against a small hub on this machine."""

import io
import json
import shutil
import time

import numpy as np
import pytest
import safetensors.numpy
import torch
from state_dicts import as_torch, state_dict

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.storage.download import cache_entries
from tnt_jax.storage.load import load_model


@pytest.fixture(scope="module")
def tensors():
    small = state_dict("timm", "tnt_ti_patch16_224", image_size=32, num_classes=10)
    return {name: np.ascontiguousarray(tensor) for name, tensor in small.items()}


@pytest.fixture
def filled(hub, tensors):
    """`me/new` in safetensors with a configuration, `me/old` of torch.save, `me/empty`, `me/other`."""
    pickled = io.BytesIO()
    torch.save(as_torch(tensors), pickled)
    feeding = {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.8, "interpolation": "bilinear"}
    labels = [f"class {number}" for number in range(10)]
    config = {"architecture": "tnt_ti_patch16_224", "num_classes": 10, "label_names": labels, "pretrained_cfg": feeding}
    resnet = json.dumps({"architecture": "resnet50", "num_classes": 1000}).encode()
    whole = safetensors.numpy.save(tensors)
    hub.repositories |= {
        "me/new": {"model.safetensors": whole, "config.json": json.dumps(config).encode()},
        "me/old": {"pytorch_model.bin": pickled.getvalue()},
        "me/empty": {"README.md": b""},
        "me/resnet": {"model.safetensors": whole, "config.json": resnet},
        "me/bert": {"model.safetensors": whole, "config.json": b'{"model_type": "bert"}'},
    }
    return hub


@pytest.mark.parametrize("name", ["me/new", "me/old", "hf-hub:me/new", "me/new@v1", "hf_hub:me/new@main"])
def test_a_name_on_the_hub_is_a_model(name, filled, tensors):
    model = load_model(name)
    np.testing.assert_array_equal(model.class_token[...], tensors["cls_token"])
    assert model.description.source["hub"] == name.rpartition(":")[2]
    requests = len(filled.requests)
    again = load_model(name)
    assert len(filled.requests) == requests
    np.testing.assert_array_equal(again.class_token[...], tensors["cls_token"])
    assert again.description == model.description


def test_timms_configuration_says_how_to_feed_it_and_what_its_classes_are(filled):
    described = load_model("me/new").description
    assert described.class_names[:2] == ("class 0", "class 1")
    assert described.preprocessing.mean == (0.1,) * 3
    assert (described.preprocessing.crop, described.preprocessing.interpolation) == (0.8, "bilinear")


@pytest.mark.parametrize("name", ["me/new", "me/old"])
def test_a_hub_that_breaks_off_at_any_request_leaves_nothing_wrong(name, filled, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the library's further tries
    expected, serve = load_model(name).description, filled.serve
    needed = len(filled.requests)
    assert needed > 3
    for at in range(needed):
        shutil.rmtree(tmp_path / "hub")
        filled.requests.clear()
        breaks = lambda request, at=at: (  # noqa: E731
            serve(request) if len(filled.requests) <= at else setattr(request, "close_connection", True)
        )
        filled.serve = breaks
        with pytest.raises(InputError, match=f"{name} cannot be fetched: the Hugging Face hub is out of reach"):
            load_model(name)
        with pytest.raises(InputError, match=f"{name} cannot be fetched"):  # nor is what is there taken for the whole
            load_model(name)
        filled.serve = serve
        assert load_model(name).description == expected


def test_weights_that_another_program_left_without_a_configuration_are_not_taken_for_the_whole(filled, monkeypatch):
    import huggingface_hub

    huggingface_hub.hf_hub_download("me/new", "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        load_model("me/new")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert load_model("me/new").description.class_names[0] == "class 0"


def test_raw_and_averaged_weights_of_one_fetched_file_differ(hub, tensors):
    raw = as_torch(tensors)
    saved = io.BytesIO()
    torch.save({"state_dict": raw, "state_dict_ema": {name: tensor + 1 for name, tensor in raw.items()}}, saved)
    hub.repositories["me/both"] = {"pytorch_model.bin": saved.getvalue()}
    for weights, more in (("raw", 0), ("ema", 1), (None, 1), ("raw", 0)):
        token = load_model("me/both", weights=weights).class_token[...]
        np.testing.assert_array_equal(token, tensors["cls_token"] + more)


def test_create_model_takes_it_with_another_head_and_image_size_and_says_so_once(filled, caplog):
    model = tnt_jax.create_model("me/new", pretrained=True, num_classes=3, image_size=64)
    assert model.head.kernel.shape == (192, 3)
    assert model.description.class_names is None
    assert model.description.preprocessing.image_size == (64, 64)
    assert [record.getMessage() for record in caplog.records] == [
        "me/new: sentence positions were resized from images of 32x32 to 64x64",
        "me/new: the head is fresh: 3 classes, where the checkpoint has 10",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/none", "me/none cannot be fetched: it is neither a file here nor a model on the Hugging Face hub"),
        ("me/new@v2", "on the Hugging Face hub it has no revision v2"),
        ("me/empty", r"me/empty on the Hugging Face hub has none of model\.safetensors"),
        ("me/resnet", "holds a model of another architecture: resnet50; this package has tnt_ti_patch16_224"),
        ("me/bert", "holds a model of another architecture: bert; this package has TNT and PyramidTNT"),
        ("hf-hub:nothing", "hf-hub:nothing should be hf-hub:OWNER/NAME"),
    ],
)
def test_what_the_hub_does_not_have_is_an_input_error(name, message, filled):
    with pytest.raises(InputError, match=message):
        load_model(name)
    assert cache_entries() == []


def test_a_hub_out_of_reach_says_what_to_do(filled, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the library's further tries
    load_model("me/old")
    filled.serve = lambda request: setattr(request, "close_connection", True)
    load_model("me/old")
    with pytest.raises(InputError, match=r"(?s)out of reach.*hf download me/new --local-dir FOLD"):
        load_model("me/new")


def test_a_hub_cache_that_cannot_be_written_is_said_and_does_without(filled, tmp_path, capsys):
    (tmp_path / "hub").write_text("a file in its place")
    (tmp_path / "cache").write_text("and here")
    assert load_model("me/new").config.num_classes == 10
    assert "the hub's cache cannot be written" in capsys.readouterr().err


def test_what_another_program_has_fetched_is_taken_when_the_hub_is_out_of_reach(filled, monkeypatch):
    import huggingface_hub

    for file in ("model.safetensors", "config.json"):
        huggingface_hub.hf_hub_download("me/new", file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_model("me/new").description.class_names[0] == "class 0"
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        load_model("me/old")
