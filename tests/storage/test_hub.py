"""Names on the Hugging Face hub, against a small hub on this machine."""

import io
import json
import time

import numpy as np
import pytest
import safetensors.numpy
import torch
from state_dicts import as_torch, state_dict

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.storage import cache
from tnt_jax.storage.load import load_model


@pytest.fixture(scope="module")
def tensors():
    small = state_dict("timm", "tnt_ti_patch16_224", image_size=32, num_classes=10)
    return {name: np.ascontiguousarray(tensor) for name, tensor in small.items()}


@pytest.fixture
def filled(hub, tensors):
    """`me/new` in safetensors with a configuration, `me/old` of torch.save, `me/shards`, `me/empty`, `me/other`."""
    pickled = io.BytesIO()
    torch.save(as_torch(tensors), pickled)
    names = list(tensors)
    halves = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    feeding = {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.8, "interpolation": "bilinear"}
    labels = [f"class {number}" for number in range(10)]
    config = {"architecture": "tnt_ti_patch16_224", "num_classes": 10, "label_names": labels, "pretrained_cfg": feeding}
    resnet = json.dumps({"architecture": "resnet50", "num_classes": 1000}).encode()
    whole = safetensors.numpy.save(tensors)
    hub.repositories |= {
        "me/new": {"model.safetensors": whole, "config.json": json.dumps(config).encode()},
        "me/old": {"pytorch_model.bin": pickled.getvalue()},
        "me/shards": {"model.safetensors.index.json": json.dumps(index).encode()},
        "me/empty": {"README.md": b""},
        "me/resnet": {"model.safetensors": whole, "config.json": resnet},
        "me/bert": {"model.safetensors": whole, "config.json": b'{"model_type": "bert"}'},
    }
    for file, part in halves.items():
        hub.repositories["me/shards"][file] = safetensors.numpy.save({name: tensors[name] for name in part})
    return hub


@pytest.mark.parametrize("name", ["me/new", "me/old", "me/shards", "hf-hub:me/new", "me/new@v1", "hf_hub:me/new@main"])
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


def test_the_second_call_reads_only_the_converted_model(filled, tmp_path, monkeypatch):
    load_model("me/old")
    for path in (tmp_path / "hub").rglob("blobs/*"):
        path.unlink()
    assert load_model("me/old").config.num_classes == 10
    (folder,) = cache.models_folder().glob("[!.]*")
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(b"damaged")
    assert load_model("me/old").config.num_classes == 10  # fetched and made again


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
        ("me/none", "me/none is neither a file here nor a model on the Hugging Face hub"),
        ("me/new@v2", "me/new on the Hugging Face hub has no revision v2"),
        ("me/empty", r"me/empty on the Hugging Face hub has none of model\.safetensors"),
        ("me/resnet", "holds a model of another architecture: resnet50; this package has tnt_ti_patch16_224"),
        ("me/bert", "holds a model of another architecture: bert; this package has TNT and PyramidTNT"),
        ("hf-hub:nothing", "hf-hub:nothing should be hf-hub:OWNER/NAME"),
    ],
)
def test_what_the_hub_does_not_have_is_an_input_error(name, message, filled):
    with pytest.raises(InputError, match=message):
        load_model(name)
    assert cache.kept() == []


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
