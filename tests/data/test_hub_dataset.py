"""`hf:OWNER/NAME` from a hub on this machine, in a process of its own, since the library reads its address once."""

import io
import os
import subprocess
import sys

import datasets
import pytest
from commands import ROOT
from loopback import Datasets
from PIL import Image

OPEN = """
import sys
from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.opening import open_split
for name in sys.argv[1:]:
    try:
        for split in ("train", "test"):
            source = open_split(DataConfig(f"hf:{name}"), split)
            print(len(source), source.class_names, source.targets.tolist(), source[1][0][0, 0].tolist())
    except InputError as error:
        print(error)
"""


def parquet(reds, labels):
    pictures = []
    for red in reds:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (red, 0, 0)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["coot", "heron"])}
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, datasets.Features(features))
    file = io.BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_read_and_kept(tmp_path):
    files = {"data/train-00000-of-00001.parquet": parquet(range(6), [0, 1] * 3)}
    files |= {"data/test-00000-of-00001.parquet": parquet([9, 8], [1, 0])}
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def opened(*names, **changes):
        command = [sys.executable, "-c", OPEN, *names]
        done = subprocess.run(command, env=environment | changes, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    expected = ["6 ('coot', 'heron') [0, 1, 0, 1, 0, 1] [1, 0, 0]", "2 ('coot', 'heron') [1, 0] [8, 0, 0]"]
    with Datasets({"me/birds": files}) as hub:
        found = opened("me/birds", "me/nothing", HF_ENDPOINT=hub.address)
    assert found[:2] == expected
    assert "hf:me/nothing cannot be opened" in found[2]
    assert opened("me/birds", HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1") == expected
