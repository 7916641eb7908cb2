"""Every kind of MODEL with every command and function that takes one."""

import dataclasses

import commands
import numpy as np
import pytest
from loopback import Files
from PIL import Image
from small_runs import TINY, config_file, tiny_run

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.models import variants
from tnt_jax.models.variants import build_model, resolve
from tnt_jax.storage import download, load
from tnt_jax.storage.load import locate, published_places
from tnt_jax.storage.publish import publish
from tnt_jax.storage.torch.write import export
from tnt_jax.training.loop import train

KINDS = {
    "folder": "folder",
    "me/digits": "hub",
    "hf-hub:me/digits": "hub",
    "me/digits@v1": "hub",
    "local-dir:hub": "hub folder",
    "hub": "hub folder",
    "ADDRESS/tnt.pth": "address",
    "tnt.pth": "file",
    "tnt.safetensors": "file",
    "tnt_ti_legacy_patch16_224": "published",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of digits in every form on a disk but that of a run."""
    folder = tmp_path_factory.mktemp("made")
    model = build_model(resolve(dataclasses.replace(TINY, num_classes=10)))
    tnt_jax.save_model(model, folder / "folder", class_names=list(map(str, range(10))))
    model = tnt_jax.load_model(folder / "folder")
    publish(model, folder / "hub")
    for name in ("tnt.pth", "tnt.safetensors"):
        export(model, folder / name, "huawei")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20), np.uint8)).save(folder / "digit.png")
    config_file(folder)
    return folder


@pytest.fixture
def everywhere(made, hub, monkeypatch):
    """The same on a hub, at an address, and under a published name; the function gives what to type for a kind."""
    hub.repositories["me/digits"] = {path.name: path.read_bytes() for path in (made / "hub").iterdir()}
    monkeypatch.chdir(made)
    with Files({"/tnt.pth": (made / "tnt.pth").read_bytes()}) as server:
        name, weights = "tnt_ti_legacy_patch16_224", (server.address + "/tnt.pth",)
        variant = dataclasses.replace(variants.VARIANTS[name], weights=weights)
        monkeypatch.setitem(variants.VARIANTS, name, variant)
        monkeypatch.setattr(load, "check_published", lambda *_: None)  # these are sizes of our own
        yield lambda kind: kind.replace("ADDRESS", server.address)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_located_and_loads_as_the_same_model(kind, everywhere, made):
    given = everywhere(kind)
    assert locate(given).kind == KINDS[kind]
    expected = tnt_jax.inference_model(made / "folder", made / "digit.png")
    result = tnt_jax.inference_model(given, made / "digit.png")
    np.testing.assert_array_equal(result["pred_scores"], expected["pred_scores"])
    again = tnt_jax.create_model(given, pretrained=True, num_classes=4)
    assert (again.config.num_classes, again.config.outer_dim) == (4, 12)


# The others differ from one of these in how they are found, which the test above knows.
WHOLE = ("me/digits@v1", "ADDRESS/tnt.pth", "run")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in WHOLE else pytest.mark.nightly) for kind in (*KINDS, "run")],
)
def test_every_command_takes_it(kind, everywhere, made, tmp_path, monkeypatch):
    if kind == "run":
        train(tiny_run(made / "run", epochs=1))
        assert locate("run").kind == "run"
    given, served = everywhere(kind), []
    monkeypatch.setattr(
        "tnt_jax.demo.serve_page", lambda model, name, port, host: served.append((model.config.outer_dim, name))
    )
    lines = {
        "predict.py": ("digit.png", "--top-k", "2"),
        "eval.py": ("--source", "digits", "--table", tmp_path / "table.csv"),
        "export.py": ("--format", "hub", "--out", tmp_path / "published"),
        "convert_torch_weights.py": (tmp_path / "converted",),
        "demo.py": ("--port", "45991"),
    }
    for script, arguments in lines.items():
        code, out, err = commands.run(script, given, *arguments)
        assert code == 0, (script, err)
        assert "Traceback" not in out + err
    assert served == [(12, given)]
    code, _, err = commands.run("visualize.py", "words", given, "digit.png", "--out", tmp_path / "a.png")
    assert code == 0, err
    code, _, err = commands.run("convert_torch_weights.py", given, tmp_path / "back.pth", "--to", "timm")
    assert code == 0, err
    arguments = ("--config", "config.py", "--run-dir", tmp_path / "next", "--init-from", given, "--epochs", "1")
    code, _, err = commands.run("train.py", *arguments)
    assert code == 0, err
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == (3 if kind == "run" else 2)
    np.testing.assert_array_equal(
        tnt_jax.inference_model(tmp_path / "converted", "digit.png")["pred_scores"],
        tnt_jax.inference_model(given, "digit.png")["pred_scores"],
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "there is no folder nowhere and no file, and there is no model 'nowhere'; the nearest names are"),
        ("tnt_s_patch16", "the nearest names are tnt_s_patch16_224"),
        ("local-dir:nowhere", "there is no folder nowhere, which local-dir:nowhere names"),
        ("ftp://host/a.pth", r"ftp://host/a\.pth is no https:// address"),
        ("x" * 5000, "there is no model 'xxx.*of 5000 letters"),
        ("tnt_ti_patch16_224", "nobody has published weights of tnt_ti_patch16_224"),
        ("ptnt_s_patch16_256", "behind the passwords on https://github.com/huawei-noah"),
        ("weights/tnt_s", "^there is no folder weights/tnt_s and no file$"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_do(given, message, tmp_path, monkeypatch, own_cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    with pytest.raises(InputError, match=message):
        tnt_jax.load_model(given)
    code, out, err = commands.run("predict.py", given, "a.jpg")
    assert (code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(InputError):
        tnt_jax.create_model(given, pretrained=True)


def test_a_home_folder_is_found_as_a_shell_finds_it(made, monkeypatch):
    monkeypatch.setenv("HOME", str(made))
    assert tnt_jax.load_model("~/folder").config.num_classes == 10
    assert tnt_jax.load_model("local-dir:~/hub").config.num_classes == 10


def test_of_a_published_name_what_is_kept_comes_first(everywhere, monkeypatch):
    name, address = "tnt_ti_legacy_patch16_224", everywhere("ADDRESS/tnt.pth")
    variant = dataclasses.replace(variants.VARIANTS[name], weights=(everywhere("ADDRESS/none.pth"), address))
    monkeypatch.setitem(variants.VARIANTS, name, variant)
    tnt_jax.create_model(name, pretrained=True)
    monkeypatch.setattr(download, "open_request", lambda _: pytest.fail("the network was asked"))
    tnt_jax.create_model(name, pretrained=True)


def test_without_a_network_a_published_name_says_what_to_fetch_in_three_lines(hub, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        tnt_jax.create_model("tnt-small-p16_3rdparty_in1k", pretrained=True)
    first, second, third = str(error.value).splitlines()
    assert first.endswith("cannot be fetched: HF_HUB_OFFLINE is set, so nothing is fetched")
    assert third == "and give it instead of the name: load_model('FILE')"
    for place in published_places("tnt-small-p16_3rdparty_in1k"):
        assert second.count(place) == 1


def test_a_step_is_for_runs_alone_and_a_folder_says_what_it_lacks(made, tmp_path):
    with pytest.raises(InputError, match=r"step 3 was asked for, and .* is not the folder of a training run"):
        tnt_jax.load_model(made / "folder", step=3)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(InputError, match=r"photos is not a model: it has no model\.json"):
        tnt_jax.load_model(tmp_path / "photos")


def test_fine_tuning_takes_classes_by_name_and_says_what_is_fresh(made, tmp_path, caplog):
    model = tnt_jax.load_model(made / "folder")
    tnt_jax.save_model(model, tmp_path / "named", class_names=[f"digit {number}" for number in range(10)])
    kernel = np.asarray(model.head.kernel[...])
    config = dataclasses.replace(model.config, num_classes=3)
    taken = load.open_for(tmp_path / "named", config, ("digit 7", "digit 1", "Digit_4"), "folder:f")
    np.testing.assert_array_equal(taken["head.kernel"], kernel[:, [7, 1, 4]])
    assert "has 3 of the model's 10 classes" in caplog.text
    fresh = load.open_for(tmp_path / "named", config, ("ant", "bee", "cow"), "folder:f")
    assert fresh["head.kernel"].shape == (12, 3)
    assert "does not have: ant, bee, cow" in caplog.text
    assert "the head is fresh" in caplog.text
    same = load.open_for(made / "folder", model.config, tuple(map(str, range(10))), "digits")
    np.testing.assert_array_equal(same["head.kernel"], kernel)
