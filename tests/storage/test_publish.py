"""A model as a repository of the hub: what timm, transformers and this package make of one JPEG file."""

import csv
import json

import commands
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from others import timm, transformers
from PIL import Image
from small_models import small_model, small_pyramid

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.storage.description import Preprocessing, describe, description_of
from tnt_jax.storage.files import write_whole
from tnt_jax.storage.folder import model_parameters
from tnt_jax.storage.hub import open_hub_folder
from tnt_jax.storage.publish import publish

NAMES = [f"animal {number}" for number in range(7)]
FEEDING = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "crop": 0.8, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "bird.jpg"
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).resize((210, 150)).save(path, quality=95)
    return path


def ours(folder, photo):
    """Scores of every class."""
    return np.asarray(tnt_jax.inference_model(f"local-dir:{folder}", photo)["pred_scores"], np.float64)


def timms(folder, photo):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return model(transform(Image.open(photo).convert("RGB"))[None])[0].double().softmax(-1).numpy()


def saved(folder, **changes):
    """A folder of a small model with seven classes and images prepared in a way of its own."""
    model = small_model(**{"num_classes": 7, **changes})
    tnt_jax.save_model(model, folder / "m", class_names=NAMES, **FEEDING)
    publish(tnt_jax.load_model(folder / "m"), folder / "hub")
    return folder / "hub"


@pytest.mark.parametrize(
    "changes", [{}, {"architecture": "legacy", "image_size": (32, 64)}], ids=["official", "legacy"]
)
def test_timm_gives_the_same_answer_from_the_same_file(changes, photo, tmp_path):
    folder = saved(tmp_path, **changes)
    np.testing.assert_allclose(timms(folder, photo), ours(folder, photo), atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_heads_outer": 12},
        {"num_heads_outer": 3, "num_heads_inner": 2, "depth": 2, "img_size": (32, 64), "in_chans": 1},
        {"embed_dim": 24, "inner_dim": 8, "num_heads_outer": 4, "patch_size": 8, "first_stride": 2},
    ],
)
def test_what_timm_saves_has_timms_logits_whatever_its_arguments_were(arguments, tmp_path):
    arguments = {"num_classes": 5, "depth": 1, "img_size": 32, **arguments}
    torch.manual_seed(0)
    theirs = timm.create_model("tnt_s_patch16_224", **arguments).eval()
    timm.models.save_for_hf(theirs, tmp_path / "hub")
    model = tnt_jax.load_model(tmp_path / "hub")
    images = np.random.default_rng(0).normal(size=(2, *model.config.image_size, model.config.in_channels))
    with torch.no_grad():
        expected = theirs(torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(model(images.astype(np.float32)), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_pool": "avg"}, "global_pool=avg, and this package has token alone"),
        ({"model_args": {"global_pool": "avg"}}, "global_pool=avg, and this package has token alone"),
        ({"pretrained_cfg": {"global_pool": "avg"}}, "global_pool=avg, and this package has token alone"),
        ({"model_args": {"qkv_bias": True}}, "qkv_bias=True, and this package has False alone"),
        ({"model_args": {"mlp_ratio": 2.0}}, "mlp_ratio=2.0, and this package has 4.0 alone"),
        ({"model_args": {"legacy": True}}, "legacy=True, and this package has False alone"),
        ({"model_args": {"norm_layer": "rms"}}, "norm_layer=rms, which this package has not"),
        ({"model_args": [1]}, "model_args is no JSON object"),
    ],
)
def test_an_argument_of_timm_that_makes_another_network_is_refused_by_name(change, message, tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= change | {"pretrained_cfg": config["pretrained_cfg"] | change.get("pretrained_cfg", {})}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        tnt_jax.load_model(folder)


def test_a_model_of_12_bits_is_published(tmp_path):
    model = small_model(num_classes=7)
    feeding = Preprocessing((32, 32), 0.9, (0.5,) * 3, (0.2,) * 3, white=4095.0)
    model.description = describe(model.config, preprocessing=feeding)
    publish(model, tmp_path / "hub")
    assert description_of(tnt_jax.load_model(tmp_path / "hub")).preprocessing == feeding


def test_transformers_pipeline_gives_the_same_five_classes(photo, tmp_path):
    folder = saved(tmp_path)
    classify = transformers.pipeline("image-classification", str(folder))
    theirs = classify(str(photo), top_k=5)
    scores = ours(folder, photo)
    top = np.argsort(-scores)[:5]
    assert [row["label"] for row in theirs] == [NAMES[label] for label in top]
    np.testing.assert_allclose([row["score"] for row in theirs], scores[top], atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224", "tnt_b_patch16_224"])
def test_published_sizes_give_the_same_logits_in_timm_and_transformers(name, photo, tmp_path):
    from tnt_jax.data.classes import imagenet_names

    tnt_jax.save_model(tnt_jax.create_model(name, seed=3), tmp_path / "m", class_names=imagenet_names())
    publish(tnt_jax.load_model(tmp_path / "m"), tmp_path / "hub")
    expected = ours(tmp_path / "hub", photo)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["architecture"] == name
    logs = np.log(timms(tmp_path / "hub", photo)) - np.log(expected)
    assert np.abs(logs).max() < 1e-4  # of logits, up to their common constant
    model = timm.create_model(name, pretrained=False, checkpoint_path=str(tmp_path / "hub" / "model.safetensors"))
    assert model.num_classes == 1000
    theirs = transformers.pipeline("image-classification", str(tmp_path / "hub"))(str(photo), top_k=5)
    top = np.argsort(-expected)[:5]
    assert [row["label"] for row in theirs] == [imagenet_names()[label] for label in top]
    np.testing.assert_allclose(np.log([row["score"] for row in theirs]), np.log(expected[top]), atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_pyramid(),
        lambda: small_model(squeeze_excitation=True),
        lambda: small_model(mlp_ratio=2.0),
        lambda: small_model(word_positions=False, sentence_positions=False),
        lambda: small_model(depth=2, inner_blocks=(1,)),
    ],
    ids=["pyramid", "squeeze_excitation", "mlp_ratio", "no_positions", "inner_blocks"],
)
def test_what_timm_has_no_architecture_for_comes_back_to_us_and_the_card_says_so(make, tmp_path):
    model = make()
    done = publish(model, tmp_path / "hub")
    assert done.readers == ("tnt_jax",)
    back = tnt_jax.load_model(f"local-dir:{tmp_path / 'hub'}")
    assert back.config == model.config
    for path, value in model_parameters(model).items():
        np.testing.assert_array_equal(model_parameters(back)[path], value, err_msg=path)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "library_name: tnt_jax" in card
    assert "only tnt_jax reads it" in card


def test_the_folder_is_a_model_wherever_one_is_taken(photo, tmp_path):
    folder = saved(tmp_path)
    described = description_of(tnt_jax.load_model(tmp_path / "m"))
    for model in (folder, f"local-dir:{folder}", folder / "model.safetensors"):
        assert description_of(tnt_jax.load_model(model)) == described
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    config["label_names"][0] = "another animal"
    (folder / "config.json").write_text(json.dumps(config))
    changed = open_hub_folder(folder).description
    assert (changed.preprocessing.mean, changed.class_names[0]) == ((0.1, 0.2, 0.3), "another animal")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(architecture="tnt_s_legacy_patch16_224"), "says tnt_s_legacy_patch16_224"),
        (
            lambda config: config.update(architecture="vit_base_patch16_224"),
            "another architecture: vit_base_patch16_224",
        ),
        (
            lambda config: config["pretrained_cfg"].update(std=[0.2, 0, 0.2]),
            "std is .* should be above 0 and at most 1",
        ),
        (lambda config: config["pretrained_cfg"].update(mean=[127.5] * 3), "divide it by 255"),
        (lambda config: config["pretrained_cfg"].update(crop_mode="squash"), "crop_mode is squash"),
        (lambda config: config["pretrained_cfg"].update(interpolation="lanczos"), "interpolation is 'lanczos'"),
        (lambda config: config.update(pretrained_cfg=[]), "pretrained_cfg is no JSON object"),
    ],
)
def test_a_configuration_that_cannot_be_is_an_input_error(change, message, tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        tnt_jax.load_model(folder)


def test_nothing_that_is_pushed_says_where_it_lay(tmp_path):
    run = tmp_path / "PRIVATE" / "run"
    source = f"csv:{tmp_path / 'PRIVATE' / 'birds.csv'}"
    write_whole(run / "config.json", lambda path: path.write_text(json.dumps({"data": {"source": source}, "seed": 3})))
    model = small_model(num_classes=7)
    model.description = describe(model.config, source={"run": str(run), "data": source, "step": 5})
    publish(model, tmp_path / "hub")
    for path in (tmp_path / "hub").iterdir():
        assert b"PRIVATE" not in path.read_bytes(), path
    card = (tmp_path / "hub" / "README.md").read_text()
    for text in ("Trained by tnt_jax on `csv:birds.csv`", '"source": "csv:birds.csv"', '"seed": 3'):
        assert text in card
    assert description_of(tnt_jax.load_model(tmp_path / "hub")).source["file"] == "model.safetensors"


def test_the_command_writes_a_card_with_results_and_pushes(hub, photo, tmp_path, monkeypatch):
    tnt_jax.save_model(small_model(num_classes=7), tmp_path / "m", class_names=NAMES)
    with (tmp_path / "results.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["model", "data", "images", "top1"], ["m", "folder:animals", 70, 0.75]])
    arguments = ("export.py", tmp_path / "m", "--format", "hub", "--out", tmp_path / "out")
    arguments += ("--push", "me/animals", "--results", tmp_path / "results.csv", "--license", "mit")
    code, _, err = commands.run(*arguments)
    assert (code, "--push needs a token" in err, (tmp_path / "out").exists()) == (2, True, False)
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    code, out, err = commands.run(*arguments)
    assert code == 0, err
    assert "read by tnt_jax, timm, transformers" in out
    assert f"pushed to {hub.address}/me/animals" in out
    pushed = hub.repositories["me/animals"]
    assert {"README.md", "config.json", "model.json", "model.safetensors"} <= set(pushed)
    card = pushed["README.md"].decode()
    for text in ("license: mit", "| folder:animals | 70 | 0.75 |", 'pipeline("image-classification", "me/animals")'):
        assert text in card
    assert "Published of these weights" not in card
    model = tnt_jax.load_model("me/animals")
    assert list(model.description.class_names) == NAMES
    code, _, err = commands.run(*arguments)
    assert (code, "out exists" in err) == (2, True)


def test_a_wrong_token_is_one_message(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="me/animals cannot be pushed to the Hugging Face hub: "):
        publish(small_model(), tmp_path / "out", push="me/animals")
    with pytest.raises(InputError, match="--push is 'animals', and should be OWNER/NAME"):
        publish(small_model(), tmp_path / "out2", push="animals")
    assert hub.address == huggingface_hub.constants.ENDPOINT
