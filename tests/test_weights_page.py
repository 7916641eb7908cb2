"""Every line of docs/weights.md's table of what is typed there and here is run: all of ours, and timm's."""

import contextlib
import io
import re
import shutil

import commands
import numpy as np
import published
import pytest
import safetensors.torch
import torch
from loopback import Files, Hub, rerouted
from others import timm
from PIL import Image
from state_dicts import as_torch

import tnt_jax
from tnt_jax.data.classes import imagenet_names
from tnt_jax.storage import download
from tnt_jax.storage.publish import publish

HUAWEI = "/github.com/huawei-noah/Efficient-AI-Backbones/releases/download/tnt/tnt_s_81.5.pth.tar"


def rows():
    """The left and the right column of the table."""
    text = (commands.ROOT / "docs" / "weights.md").read_text()
    table = text.partition("| mmpretrain or timm | here |\n|---|---|\n")[2].partition("\n\n")[0]
    return [re.fullmatch(r"\| `(.*)` \| `(.*)` \|", line).groups() for line in table.splitlines()]


def state_dict(record):
    _, manifest = published.record(record)
    return as_torch(published.state_dict(manifest))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The files that the table names."""
    folder = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    for name in ("bird.jpg", "photos/a.jpg", "photos/b.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / name)
    for name in ("n01440764", "n02102040"):
        (folder / "imagenette" / "test" / name).mkdir(parents=True)
        shutil.copy(folder / "bird.jpg", folder / "imagenette" / "test" / name / "1.jpg")
        (folder / "imagenette" / "train" / name).mkdir(parents=True)
        shutil.copy(folder / "bird.jpg", folder / "imagenette" / "train" / name / "1.jpg")
    official = state_dict("timm_tnt_s")
    torch.save(official, folder / "mine.pth")
    averaged = {name: tensor * 0.5 for name, tensor in official.items()}
    torch.save({"state_dict": official, "state_dict_ema": averaged}, folder / "train.pth.tar")
    tnt_jax.save_model(
        tnt_jax.load_model(folder / "mine.pth"), folder / "weights" / "mine", class_names=imagenet_names()
    )
    publish(tnt_jax.load_model(folder / "weights" / "mine"), folder / "hub")
    return folder


@pytest.fixture(scope="module")
def world(here, tmp_path_factory):
    """What the network has: timm's repositories, our own, and huawei's file."""
    import huggingface_hub.constants

    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("cache")
    weights = (here / "hub" / "model.safetensors").read_bytes()
    config = (here / "hub" / "config.json").read_bytes()
    legacy = safetensors.torch.save(state_dict("timm_tnt_s_legacy"))
    published_config = config.replace(b'"label_names"', b'"unused"')
    repositories = {
        "timm/tnt_s_patch16_224.in1k": {"model.safetensors": weights, "config.json": published_config},
        "timm/tnt_s_legacy_patch16_224.in1k": {
            "model.safetensors": legacy,
            "config.json": published_config.replace(b"tnt_s_patch16_224", b"tnt_s_legacy_patch16_224"),
        },
        "me/mine": {path.name: path.read_bytes() for path in (here / "hub").iterdir()},
    }
    buffer = io.BytesIO()
    torch.save(state_dict("huawei_tnt_s"), buffer)
    with Hub(repositories) as hub, Files({HUAWEI: buffer.getvalue()}) as files:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
        }.items():
            patch.setattr(huggingface_hub.constants, name, value)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(download, "open_request", rerouted(download.open_request, files.address))
        patch.setenv("HF_TOKEN", "hf_loopback")
        patch.chdir(here)
        yield hub
    patch.undo()


@pytest.mark.nightly
def test_every_line_on_the_right_runs(world, here):
    known = {"numpy": np, "tnt_jax": tnt_jax}
    for _, line in rows():
        if line.startswith("python "):
            script, *arguments = line.removeprefix("python ").removeprefix("-m ").split()
            script = script if script.endswith(".py") else f"{script.replace('.', '/')}.py"
            code, out, err = commands.run(script, *arguments)
            assert code == 0, (line, err)
            assert out, line
        else:
            exec(line, known)
    assert known["model"].config.name == "tnt_s_legacy_patch16_224"
    assert "me/mine" in world.repositories
    assert (here / "out.pth").exists()


@pytest.mark.nightly
def test_every_line_of_timms_on_the_left_runs(world, here):
    known = {"timm": timm, "torch": torch, "model": timm.create_model("local-dir:hub", pretrained=True)}
    lines = [line for line, _ in rows() if line.startswith("timm.")]
    assert len(lines) > 8
    for line in lines:
        with contextlib.redirect_stderr(io.StringIO()):
            exec(line, known)


def test_the_table_has_one_line_on_each_side():
    assert len(rows()) > 15
    assert all(";" not in line and " or " not in line for row in rows() for line in row)
