import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import venv

import commands
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_models import small_model, small_pyramid
from small_runs import tiny_run

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.data.mixing import normalise
from tnt_jax.export import description_path, export_model, files, formats, load_export, quantize
from tnt_jax.export.quantize import Judged
from tnt_jax.models.variants import with_formulation
from tnt_jax.storage.description import description_of
from tnt_jax.training.loop import train

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
    described = json.loads((tmp_path / "a.stablehlo.json").read_text())
    assert described["input"]["shape"] == ["batch", 32, 32, 3]
    assert described["output"]["shape"] == ["batch", 3]
    assert (described["class_names"], described["input"]["resize_to_cover"]) == (list(NAMES), [35, 35])
    assert described["made"]["versions"]["jax"] == jax.__version__
    assert datetime.date.fromisoformat(described["made"]["read_until"]) > datetime.date.today()

    np.save(tmp_path / "five.npy", pixels(5))  # it was compared with three images when it was written
    stranger = [sys.executable, "-c", STRANGER, str(path), str(tmp_path / "five.npy")]
    subprocess.run(stranger, check=True, cwd=tmp_path, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    ours = logits(model, pixels(5))
    np.testing.assert_allclose(np.load(tmp_path / "five.npy.logits.npy"), ours, atol=1e-4, rtol=1e-5)

    code, _, err = commands.run(*command)
    assert code == 2
    assert "a.stablehlo exists" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        small_model,
        pytest.param(small_pyramid, marks=pytest.mark.slow),
        pytest.param(
            lambda: small_model(name="tnt_s_legacy_patch16_224", squeeze_excitation=True), marks=pytest.mark.nightly
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
    kinds = {node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node}
    assert kinds >= {"MatMul", "LayerNormalization", "Softmax"}
    assert kinds.isdisjoint({"Einsum", "ReduceSumSquare", "Identity"})  # the parts of those
    assert onnx.load(tmp_path / "small.onnx").opset_import[0].version == 17
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (ours,) = session.run(None, {"pixels": pixels(count)})
        np.testing.assert_allclose(ours, logits(model, pixels(count)), atol=1e-4, rtol=1e-4)


@pytest.mark.nightly
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
        (small_model, "a.onnx", "stablehlo", "should end in .stablehlo"),
        (small_model, "nowhere/a.onnx", "onnx", "there is no folder"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(model, name, format, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_model(model(), tmp_path / name, format)
    assert not list(tmp_path.iterdir())


def test_a_large_model_and_a_missing_converter_and_wrong_logits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ONNX_SIZE", 1000)
    with pytest.raises(InputError, match="2 GB at most"):
        export_model(small_model(), tmp_path / "a.onnx", "onnx")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(InputError, match="ONNX needs jax2onnx, which is not installed: pip install"):
        export_model(small_model(), tmp_path / "a.onnx", "onnx")
    model = small_model()
    wrong = lambda images: logits(model, images) + 1e-3 * np.abs(logits(model, images)).max()  # noqa: E731
    off = dataclasses.replace(files.FORMATS["stablehlo"], write=lambda model, compute, samples: (b"", wrong))
    monkeypatch.setitem(files.FORMATS, "stablehlo", off)
    with pytest.raises(InputError, match=r"differ from the model's by 0.001"):
        export_model(model, tmp_path / "a.stablehlo", "stablehlo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "fields"),
    [
        ("onnx", {"dtype": "bfloat16", "param_dtype": "bfloat16"}),
        pytest.param("onnx", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("stablehlo", {"dtype": "bfloat16", "param_dtype": "bfloat16"}, marks=pytest.mark.slow),
        ("stablehlo", {"dtype": "bfloat16"}),
    ],
)
def test_what_was_trained_in_bfloat16_is_exported_in_float32(format, fields, tmp_path):
    """Ten of the shipped configurations train in bfloat16."""
    import onnxruntime

    model, path = small_model(**fields), tmp_path / f"a.{format}"
    tnt_jax.save_model(model, tmp_path / "m")
    code, _, err = commands.run("export.py", tmp_path / "m", "--format", format, "--out", path)
    assert code == 0, err
    expected = logits(with_formulation(model, "reference", dtype="float32"), pixels(2))
    if format == "onnx":
        (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"pixels": pixels(2)})
    else:
        found = load_export(path)[0](pixels(2))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_stablehlo_in_bfloat16_is_compared_with_the_equations_in_bfloat16(tmp_path):
    model = small_model()
    done = export_model(model, tmp_path / "a.stablehlo", "stablehlo", dtype="bfloat16")
    assert done.difference < 1e-4
    exact, found = logits(model, pixels(2)), load_export(tmp_path / "a.stablehlo")[0](pixels(2))
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.1


@pytest.mark.parametrize(
    ("white", "kind", "black_and_white"),
    [(4095, np.uint16, (0, 4095)), (1, np.float32, (-1000.0, 1000.0)), (None, np.uint16, (0, 65535))],
)
@pytest.mark.parametrize("format", ["onnx", pytest.param("stablehlo", marks=pytest.mark.slow)])
def test_a_file_takes_the_samples_that_the_model_was_trained_on(format, white, kind, black_and_white, tmp_path):
    """What predict.py makes of the same array, black and white being different pictures."""
    import onnxruntime

    model, path = small_model(), tmp_path / f"a.{format}"
    feeding = {"white": white} | ({"mean": (-500.0,) * 3, "std": (300.0,) * 3} if white == 1 else {})
    known = description_of(model)
    model.description = dataclasses.replace(known, preprocessing=dataclasses.replace(known.preprocessing, **feeding))
    images = np.stack([np.full((32, 32, 3), value, kind) for value in black_and_white])
    export_model(model, path, format, images=None if white else images)
    about = json.loads(description_path(path).read_text())["input"]
    assert (about["dtype"], about["white"]) == ("float32", white or 65535)
    samples = images.astype(np.float32)
    if format == "onnx":
        (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"pixels": samples})
    else:
        found = load_export(path)[0](samples)
    scores = np.asarray(jax.nn.softmax(found))
    for row, image in zip(scores, images, strict=True):
        np.testing.assert_allclose(row, tnt_jax.inference_model(model, image)["pred_scores"], atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_a_file_is_promised_for_six_months(tmp_path, monkeypatch):
    class Date(datetime.date):
        @classmethod
        def today(cls):
            return cls(2026, 8, 31)

    monkeypatch.setattr(datetime, "date", Date)
    export_model(small_model(), tmp_path / "a.stablehlo", "stablehlo")
    assert json.loads((tmp_path / "a.stablehlo.json").read_text())["made"]["read_until"] == "2027-02-28"


def test_a_newer_opset_has_gelu_as_one_operator(tmp_path):
    import onnx

    export_model(small_model(), tmp_path / "a.onnx", "onnx", opset=20)
    proto = onnx.load(tmp_path / "a.onnx")
    assert proto.opset_import[0].version == json.loads((tmp_path / "a.onnx.json").read_text())["opset"] == 20
    assert {node.op_type for node in proto.graph.node} >= {"Gelu"}
    with pytest.raises(InputError, match="--opset is 9, and must lie between 17 and 23"):
        export_model(small_model(), tmp_path / "b.onnx", "onnx", opset=9)


def test_a_file_is_read_back_and_one_that_is_too_old_says_since_when(tmp_path):
    model, path = small_model(), tmp_path / "a.stablehlo"
    export_model(model, path, "stablehlo")
    call, about = load_export(path)
    np.testing.assert_allclose(call(pixels(2)), logits(model, pixels(2)), atol=1e-5)

    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    module = bytes(exported.mlir_module_serialized)  # of a version that this JAX does not know
    unknown = re.sub(rb"(?<=StableHLO_v1)\.\d+", lambda found: bytes(len(found[0])), module)
    strange = dataclasses.replace(exported, mlir_module_serialized=unknown)
    path.write_bytes(strange.serialize())
    with pytest.raises(InputError, match="cannot be read: it is damaged, export the model again"):
        load_export(path)
    about["made"]["versions"]["jax"] = "99.1.0"
    description_path(path).write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"jax 99.1.0 made it, and this is jax .*; pip install 'jax>=99.1.0'"):
        load_export(path)
    about["made"] |= {"date": "2024-02-01", "read_until": "2024-08-01", "versions": {"jax": "0.4.24"}}
    description_path(path).write_text(json.dumps(about))
    message = "jax 0.4.24, which made it on 2024-02-01, promised that it can be read until 2024-08-01, and this is jax"
    with pytest.raises(InputError, match=f"{message} .*pip install jax==0.4.24"):
        load_export(path)
    description_path(path).unlink()
    with pytest.raises(InputError, match="cannot be read as an export"):
        load_export(path)


def test_both_formats_lie_side_by_side(tmp_path):
    for format in ("stablehlo", "onnx"):
        export_model(small_model(), tmp_path / f"a.{format}", format, images=pixels(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.onnx",
        "a.onnx.json",
        "a.stablehlo",
        "a.stablehlo.json",
    ]


RUN_EXPORT = re.search(
    r"<!-- run_export.py -->\n```python\n(.*?)```", (commands.ROOT / "docs/export.md").read_text(), re.S
)


@pytest.mark.nightly
@pytest.mark.parametrize(("format", "packages"), [("stablehlo", ["jax", "flatbuffers"]), ("onnx", ["onnxruntime"])])
def test_twenty_lines_run_a_file_in_an_environment_that_has_nothing_of_ours(format, packages, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (60, 91, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(photo).save(tmp_path / "photo.jpg", exif=exif)
    (tmp_path / "run_export.py").write_text(RUN_EXPORT[1])
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    here = {"cwd": tmp_path, "env": environment, "check": True}
    subprocess.run([python, "-m", "pip", "install", "--quiet", "pillow", "numpy", *packages], **here)
    for size in ((32, 32), (32, 48)):
        model = small_model(image_size=size)
        tnt_jax.save_model(model, tmp_path / f"m{size[1]}", class_names=NAMES)
        export_model(tnt_jax.load_model(tmp_path / f"m{size[1]}"), tmp_path / f"m{size[1]}.{format}", format)
        command = [python, "run_export.py", f"m{size[1]}.{format}", "photo.jpg"]
        found = subprocess.run(command, **here, capture_output=True, text=True).stdout.split()
        expected = tnt_jax.inference_model(tmp_path / f"m{size[1]}", tmp_path / "photo.jpg")
        assert found[0] == expected["pred_class"]
        assert float(found[1]) == pytest.approx(expected["pred_score"], abs=1e-4)


@pytest.mark.slow
def test_int8_agrees_with_float32_in_a_third_of_its_size(tmp_path):
    model = tnt_jax.create_model("tnt_ti_patch16_224", image_size=32, depth=2, num_classes=3)
    judged = Judged(pixels(16), pixels(24), None, "noise")
    done = export_model(model, tmp_path / "a.onnx", "onnx", int8=judged)
    assert done.quantization["top1_int8"] == 1.0
    assert done.quantization["kept_in_float32"] == []
    assert json.loads((tmp_path / "a.onnx.json").read_text())["quantization"] == done.quantization
    export_model(model, tmp_path / "b.onnx", "onnx")
    assert done.size < (tmp_path / "b.onnx").stat().st_size / 3


@pytest.mark.slow
def test_a_layer_that_int8_ruins_stays_in_float32_and_one_that_is_too_many_is_named(tmp_path):
    model = small_model()
    model.norm.scale[...] = model.norm.scale[...].at[0].set(1e5)  # one channel takes the whole range of eight bits,
    model.head.kernel[...] = model.head.kernel[...].at[0].set(0)  # and nobody reads it
    done = export_model(model, tmp_path / "a.onnx", "onnx", int8=Judged(pixels(16), pixels(48), None, "noise", 0.1))
    assert "head" in done.quantization["kept_in_float32"]
    assert done.quantization["top1_int8"] >= 0.8
    impossible = Judged(pixels(16), pixels(48), None, "noise", -0.5)
    message = "with half of the layers in float32, more than --tolerance -50; those that lose most are head"
    with pytest.raises(InputError, match=message):
        export_model(model, tmp_path / "b.onnx", "onnx", int8=impossible)
    assert not (tmp_path / "b.onnx").exists()


def test_int8_knows_the_layers_of_a_bfloat16_model_by_name(tmp_path, monkeypatch):
    found = {}

    def layers(content, judged, parameters):
        found.update(quantize._layers(quantize._simplified(content, tmp_path / "simplified.onnx"), parameters))
        raise InputError("enough")

    monkeypatch.setattr(files, "quantize", layers)
    model = small_model(dtype="bfloat16", param_dtype="bfloat16")
    with pytest.raises(InputError, match="enough"):
        export_model(model, tmp_path / "a.onnx", "onnx", int8=Judged(pixels(2), pixels(2), None, "noise"))
    assert {"head", "blocks.0.outer.attn.qkv", "blocks.0.inner.mlp.fc1"} <= set(found.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "stablehlo", "--quantize", "int8"], "--quantize is for --format onnx"),
        (["--format", "onnx", "--quantize", "int8", "--tolerance", "-1"], "--tolerance is -1.0, and must lie between"),
        (["--format", "onnx", "--quantize", "int8"], "--source must say what to calibrate with"),
        (["--format", "onnx", "--quantize", "int8", "--source", "synthetic:0"], "synthetic"),
    ],
)
def test_what_cannot_be_quantised_is_said(flags, message, tmp_path):
    tnt_jax.save_model(small_model(in_channels=1), tmp_path / "m", class_names=NAMES)
    code, _, err = commands.run("export.py", tmp_path / "m", *flags, "--out", tmp_path / "a.onnx")
    assert code == 2
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_the_command_quantises_a_run_with_its_own_images(tmp_path):
    config = tiny_run(tmp_path / "run")
    train(config)
    code, out, err = commands.run(
        "export.py", tmp_path / "run", "--format", "onnx", "--quantize", "int8", "--out", tmp_path / "a.onnx"
    )
    assert code == 0, err
    assert "int8: accuracy" in out
    report = json.loads((tmp_path / "a.onnx.json").read_text())["quantization"]
    assert report["measured_on"] == "digits, test, 360 images"
    assert report["top1_int8"] >= report["top1_float32"] - 0.01


@pytest.mark.nightly
def test_the_tolerance_holds_for_photographs_as_well(tmp_path):
    model = small_model()
    model.norm.scale[...] = model.norm.scale[...].at[0].set(1e5)  # int8 ruins the head, as above
    model.head.kernel[...] = model.head.kernel[...].at[0].set(0)
    tnt_jax.save_model(model, tmp_path / "model")
    flags = ("--format", "onnx", "--quantize", "int8", "--tolerance", "100", "--out", tmp_path / "a.onnx")
    code, _, err = commands.run("export.py", tmp_path / "model", *flags)
    assert code == 0, err
    report = json.loads((tmp_path / "a.onnx.json").read_text())["quantization"]
    assert report["measured_on"].startswith("parts of two photographs")
    assert report["top1_int8"] < 0.99
    assert report["kept_in_float32"] == []


@pytest.mark.nightly
def test_the_convolutions_of_a_pyramid_are_in_eight_bits_as_well(tmp_path):
    import onnx

    model = small_pyramid()
    judged = Judged(pixels(16), pixels(24), None, "noise", 1.0)
    export_model(model, tmp_path / "a.onnx", "onnx", int8=judged)
    weights = onnx.load(tmp_path / "a.onnx").graph.initializer
    kernels = [each for each in weights if each.data_type == onnx.TensorProto.INT8 and list(each.dims[2:]) == [3, 3]]
    assert len(kernels) == 5 + 3 * 2  # of the stem, and between the stages
