import json
import subprocess
import sys

import commands
import numpy as np
import pytest
from flax import nnx
from small_models import small_model, small_pyramid

import tnt_jax
from tnt_jax import export
from tnt_jax.config import InputError
from tnt_jax.data.mixing import normalise
from tnt_jax.export import export_model
from tnt_jax.storage.description import description_of

NAMES = ("ant", "bee", "cat")
# What somebody does who has JAX and not this project.
STRANGER = """
import sys
sys.modules["tnt_jax"] = None  # importing it fails
import jax, numpy as np
call = jax.export.deserialize(open(sys.argv[1], "rb").read()).call
np.save(sys.argv[2] + ".logits.npy", call(np.load(sys.argv[2])))
"""


def logits(model, pixels):
    return np.asarray(
        nnx.jit(lambda model, images: model(images))(model, normalise(pixels, description_of(model).preprocessing))
    )


def pixels(count, channels=3):
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, channels), np.uint8)


def test_the_command_writes_stablehlo_for_a_process_without_this_project(tmp_path):
    model, path = small_model(), tmp_path / "a.stablehlo"
    tnt_jax.save_model(model, tmp_path / "small", class_names=NAMES)
    command = ["export.py", tmp_path / "small", "--format", "stablehlo", "--out", path]
    code, out, err = commands.run(*command)
    assert code == 0, err
    assert "cannot be trained" in out
    described = json.loads((tmp_path / "a.json").read_text())
    assert described["input"]["shape"] == ["batch", 32, 32, 3]
    assert described["output"]["shape"] == ["batch", 3]
    assert (described["class_names"], described["crop"]) == (list(NAMES), 0.9)

    np.save(tmp_path / "five.npy", pixels(5))  # it was compared with three images when it was written
    stranger = [sys.executable, "-c", STRANGER, str(path), str(tmp_path / "five.npy")]
    subprocess.run(stranger, check=True, cwd=tmp_path, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    ours = logits(model, pixels(5))
    np.testing.assert_allclose(np.load(tmp_path / "five.npy.logits.npy"), ours, atol=1e-4, rtol=1e-5)

    code, _, err = commands.run(*command)
    assert code == 2
    assert "a.stablehlo exists" in err


@pytest.mark.parametrize(
    "make",
    [
        small_model,
        pytest.param(small_pyramid, marks=pytest.mark.slow),
        pytest.param(
            lambda: small_model(name="tnt_s_legacy_patch16_224", squeeze_excitation=True), marks=pytest.mark.slow
        ),
    ],
    ids=["official", "pyramid", "legacy"],
)
def test_onnx_runtime_computes_the_same_logits_for_any_number_of_images(make, tmp_path):
    import onnx
    import onnxruntime

    model = make()
    done = export_model(model, tmp_path / "small.onnx", "onnx")
    assert done.difference <= 1e-4
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (ours,) = session.run(None, {"pixels": pixels(count)})
        np.testing.assert_allclose(ours, logits(model, pixels(count)), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_tnt_s_in_onnx_runtime(tmp_path):
    import onnxruntime

    model = tnt_jax.create_model("tnt_s_patch16_224")
    export_model(model, tmp_path / "tnt_s.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "tnt_s.onnx"), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    np.testing.assert_allclose(session.run(None, {"pixels": images})[0], logits(model, images), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "name", "format", "message"),
    [
        (lambda: small_model(dtype="bfloat16"), "a.onnx", "onnx", "it computes in bfloat16 .* or as stablehlo"),
        (small_model, "a.onnx", "stablehlo", "should end in .stablehlo"),
        (small_model, "nowhere/a.onnx", "onnx", "there is no folder"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(model, name, format, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_model(model(), tmp_path / name, format)
    assert not list(tmp_path.iterdir())


def test_a_large_model_and_a_missing_converter_and_wrong_logits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_ONNX", 1000)
    with pytest.raises(InputError, match="2 GB at most"):
        export_model(small_model(), tmp_path / "a.onnx", "onnx")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(InputError, match="ONNX needs jax2onnx, which is not installed: pip install"):
        export_model(small_model(), tmp_path / "a.onnx", "onnx")
    monkeypatch.setattr(export, "to_stablehlo", lambda model, compute: (b"", lambda images: np.zeros((len(images), 3))))
    with pytest.raises(InputError, match="differ from the model's by"):
        export_model(small_model(), tmp_path / "a.stablehlo", "stablehlo")
    assert not list(tmp_path.iterdir())
