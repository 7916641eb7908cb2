"""The notebooks run from top to bottom. `make check` runs three, `make nightly` all."""

import gzip
import json
import os
import struct

import commands
import numpy as np
import pytest

from tnt_jax.data.idx import IDX_FILES

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
NOTEBOOKS = sorted((commands.ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Fashion-MNIST, or where it is not installed noise in its place."""
    if os.path.isdir(FASHION_MNIST):
        return FASHION_MNIST
    folder, rng = tmp_path_factory.mktemp("data") / "fashion", np.random.default_rng(0)
    folder.mkdir()
    for names, count in zip(IDX_FILES.values(), (4000, 500), strict=True):
        for name, values in zip(names, (rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10), strict=True):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), 1))
    return str(folder)


def test_there_are_the_six_notebooks_with_their_outputs():
    names = ["convert", "finetune", "inside_tnt", "masks_and_boxes", "own_images", "quickstart"]
    assert [path.stem for path in NOTEBOOKS] == names
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell["outputs"]]
        assert outputs
        assert not any(output["output_type"] == "error" for output in outputs)


NIGHTLY = ("finetune", "inside_tnt", "masks_and_boxes", "own_images")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(each, marks=getattr(pytest.mark, "nightly" if each.stem in NIGHTLY else "slow"))
        for each in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(path, clothes, monkeypatch):
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    monkeypatch.setenv("FASHION_MNIST", clothes)
    monkeypatch.delenv("XLA_FLAGS")  # which compiles quickly for tests; a user's notebook does not
    runner = ExecutePreprocessor(timeout=600, kernel_name="python3")
    runner.preprocess(nbformat.read(path, 4), {"metadata": {"path": str(path.parent)}})
