"""Weights of transformers' `DetrForObjectDetection` with a TNT of timm's as its backbone, in and out."""

import commands
import numpy as np
import pytest
import torch
from others import transformers
from safetensors.numpy import load_file, save_file

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.storage.torch.write import export

CLASSES = 3


@pytest.fixture(scope="module")
def theirs():
    given = {"backbone": "tnt_s_patch16_224", "out_indices": [11], "use_pretrained_backbone": False}
    torch.manual_seed(0)
    config = transformers.DetrConfig(backbone_config=transformers.TimmBackboneConfig(**given), num_labels=CLASSES)
    model = transformers.DetrForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.model.query_position_embeddings.weight.normal_()
    return model


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detr")
    theirs.save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def converted(saved):
    folder = saved.parent / "converted"
    commands.run("convert_torch_weights.py", saved, folder)
    return folder


def test_what_transformers_finds_is_found_here(theirs, converted):
    model = tnt_jax.load_model(converted)
    assert (model.config.name, model.config.num_classes) == ("tnt_s_patch16_224", CLASSES)
    images = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    (found,) = np.asarray(model(images)).transpose(1, 0, 2, 3)
    np.testing.assert_allclose(found[..., :-4], expected.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[..., -4:], expected.pred_boxes, rtol=1e-4, atol=1e-5)


def test_they_come_back_as_they_went(saved, converted, theirs, tmp_path):
    commands.run("convert_torch_weights.py", converted, tmp_path / "back.safetensors", "--to", "transformers")
    before, after = load_file(saved), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    # transformers itself reads them, none missing and none left over.
    (tmp_path / "back.safetensors").rename(tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    _, loading = transformers.DetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_tensor_more_or_less_is_named(saved, tmp_path):
    tensors = load_file(saved)
    del tensors["model.encoder.layers.3.fc1.bias"]
    tensors["model.encoder.layers.6.fc1.bias"] = np.zeros(2048, np.float32)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError) as error:
        tnt_jax.load_model(tmp_path / "other.safetensors")
    assert "model.encoder.layers.3.fc1.bias (2048,) is missing" in str(error.value)
    assert "model.encoder.layers.6.fc1.bias (2048,) is not in this model" in str(error.value)


def test_the_papers_detr_has_no_place_in_transformers(tmp_path):
    sizes = {"image_size": 32, "depth": 4, "inner_dim": 8, "inner_heads": 2, "outer_dim": 32, "outer_heads": 2}
    for head in ("detr", "class"):
        model = tnt_jax.create_model("tnt_ti_patch16_224", num_classes=2, head=head, **sizes)
        with pytest.raises(InputError, match=rf"head detr_unpooled, and \S+ has head {head}"):
            export(model, tmp_path / "model.pth", "transformers")
