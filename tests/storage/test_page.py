"""The lines of mmpretrain's page of TNT, each run as it stands there but for the import, in processes of their own."""

import os
import subprocess
import sys

import commands
import numpy as np
import published
import pytest
import torch
from loopback import Files, Hub
from PIL import Image
from state_dicts import as_torch

PAGE = """
from tnt_jax import get_model, inference_model, list_models

predict = inference_model('tnt-small-p16_3rdparty_in1k', 'demo/bird.JPEG')
print(predict['pred_class'])
print(predict['pred_score'])

model = get_model('tnt-small-p16_3rdparty_in1k', pretrained=True)
inputs = RAND(1, 224, 224, 3)
out = model(inputs)
print(type(out))
# To extract features.
feats = model.extract_feat(inputs)
print(type(feats))
"""
PREFIX = """
import jax, numpy
def RAND(*shape):
    return numpy.random.default_rng(0).random(shape, numpy.float32)
"""
AFTER = """
numpy.savez('answers.npz', logits=model(IMAGES), scores=predict['pred_scores'], feats=feats[0])
"""
CONTRASTIVE = "/github.com/contrastive/pytorch-image-models/releases/download/TNT/tnt_s_patch16_224.pth.tar"
OPENMMLAB = "/download.openmmlab.com/mmclassification/v0/tnt/tnt-small-p16_3rdparty_in1k_20210903-c56ee7df.pth"


@pytest.fixture(scope="module")
def record():
    return published.record("mmpretrain_tnt_s")


@pytest.fixture
def folder(record, tmp_path):
    """With the page's picture, the images of the golden record, and its checkpoint as mmpretrain saves one."""
    _, manifest = record
    tensors = as_torch(published.state_dict(manifest))
    torch.save({"meta": {"mmcls_version": "0.15.0"}, "state_dict": tensors}, tmp_path / "a.pth")
    (tmp_path / "demo").mkdir()
    pixels = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((400, 300)).save(tmp_path / "demo" / "bird.JPEG", "JPEG")
    np.save(tmp_path / "images.npy", published.images(manifest))
    return tmp_path


def run(folder, script, **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{commands.ROOT}:{commands.ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.nightly
def test_the_page_runs_and_answers_as_mmpretrain_does_and_again_without_a_network(record, folder):
    arrays, _ = record
    script = PREFIX + PAGE + "IMAGES = numpy.load('images.npy')\n" + AFTER
    # mmpretrain's own file cannot be made again, since its name has the digits of its hash: the server has another of
    # the published addresses, the hub and the first address have nothing.
    with Files({CONTRASTIVE: (folder / "a.pth").read_bytes()}) as files, Hub() as hub:
        reroute = "import loopback; from tnt_jax.storage import download\n"
        reroute += f"download.open_request = loopback.rerouted(download.open_request, {files.address!r})\n"
        first = run(folder, reroute + script, HF_ENDPOINT=hub.address)
        assert first.returncode == 0, first.stderr
        assert OPENMMLAB in [path for _, path, _ in files.requests]
    lines = first.stdout.splitlines()
    assert lines[2:] == ["<class 'jaxlib._jax.ArrayImpl'>", "<class 'tuple'>"]
    assert "fetching tnt_s_patch16_224.pth.tar (95 MB)" in first.stderr
    answers = dict(np.load(folder / "answers.npz"))
    assert np.abs(answers["logits"] - arrays["logits"]).max() < 1e-5 * np.abs(arrays["logits"]).max()
    assert answers["feats"].shape == (1, 384)
    assert lines[0] != str(int(answers["scores"].argmax()))  # a name of ImageNet's
    assert float(lines[1]) == answers["scores"].max()

    second = run(folder, script, HF_HUB_OFFLINE="1")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
