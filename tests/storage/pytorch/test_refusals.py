"""What convert_torch_weights.py refuses, in one message, and leaves nothing behind."""

import os
import sys

import commands
import numpy as np
import pytest
import safetensors.numpy
import torch
from small_models import small_model
from state_dicts import as_torch, save_safetensors

import tnt_jax
from tnt_jax.commands.convert import parse_image_size
from tnt_jax.config import InputError
from tnt_jax.storage.convert import convert
from tnt_jax.storage.torch.write import export


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch owned",)


def _damage_tensor(path):
    """One bit in the middle, which is in the data of a tensor."""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def _faulty_files(folder, small):
    """name -> what to write, and a pattern for what is said of it."""
    huge = small["norm.bias"].copy()
    huge[3] = np.inf
    faults = {
        "left_over.safetensors": ({"extra.weight": huge}, r"extra\.weight \(192,\) is not in this model"),
        "shape.safetensors": ({"norm.bias": huge[:5]}, r"norm\.bias is \(5,\), and should be \(192,\)"),
        "infinite.safetensors": (
            {"norm.bias": huge, "norm.weight": huge * np.nan},
            r"norm\.bias has values that are not finite in float32\n  norm\.weight has values",
        ),
        "integer.safetensors": ({"norm.bias": np.ones(192, np.int32)}, r"norm\.bias is int32"),
        "wide.safetensors": ({"cls_token": np.ones((1, 1, 77), np.float32)}, "sentences of 77 channels"),
    }
    for name, (change, message) in faults.items():
        save_safetensors({**small, **change}, folder / name)
        yield name, message
    missing = {name: tensor for name, tensor in small.items() if name not in ("norm.bias", "blocks.3.proj.weight")}
    save_safetensors(missing, folder / "missing.safetensors")
    yield "missing.safetensors", r"blocks\.3\.proj\.weight .* is missing\n  norm\.bias .* is missing"
    save_safetensors({"cls_token": huge, "pos_embed": huge}, folder / "vit.safetensors")
    yield "vit.safetensors", r"another network \(2 tensors: cls_token, pos_embed"

    torch.save({"state_dict": {**as_torch(small), "norm.bias": RunsCode()}}, folder / "code.pth")
    yield "code.pth", r"norm\.bias is <(posix|nt)\.system>, and should be a tensor of \(192,\)"
    torch.save(as_torch(small), folder / "cut.pth")
    (folder / "cut.pth").write_bytes((folder / "cut.pth").read_bytes()[:-5000])
    yield "cut.pth", "is damaged or no PyTorch file"
    torch.save(as_torch(small), folder / "flipped.pth")
    _damage_tensor(folder / "flipped.pth")
    yield "flipped.pth", r"is damaged: the checksum of flipped/data/\d+ in it is wrong"
    (folder / "text.pt").write_text("no checkpoint")
    yield "text.pt", r"text\.pt is no checkpoint: neither safetensors nor a file that torch\.save wrote"
    torch.save([1, 2], folder / "list.pth")
    yield "list.pth", "holds a list and no state dict"
    torch.save({"epoch": 3, "lr": 0.1}, folder / "numbers.pth")
    yield "numbers.pth", r"has no tensors; it holds epoch \(int\), lr \(float\)"
    save_safetensors(small, folder / "cut.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-100])
    yield "cut.safetensors", "is damaged or no safetensors file"
    (folder / "weights.h5").touch()
    yield "weights.h5", "is empty"
    yield "nowhere.pth", "there is no folder .*nowhere.pth and no file"
    (folder / "folder").mkdir()
    yield "folder", r"is not a model: it has no model\.json"
    metadata = {"tnt_jax": "{"}
    plain = {name: np.ascontiguousarray(tensor) for name, tensor in small.items()}
    safetensors.numpy.save_file(plain, folder / "description.safetensors", metadata=metadata)
    yield "description.safetensors", "the description of the model in .* is damaged"


def test_bad_files_give_one_message_and_leave_nothing(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in list(_faulty_files(tmp_path, small)):
        with pytest.raises(InputError, match=message):
            convert(tmp_path / name, tmp_path / "out" / "model", num_classes=10)
        assert not (tmp_path / "out").exists(), name
    assert not (tmp_path / "owned").exists()


def test_a_bad_file_ends_the_command_with_2_and_one_message(small, tmp_path):
    checkpoint = save_safetensors({**small, "extra": small["norm.bias"]}, tmp_path / "a.safetensors")
    code, out, err = commands.run("convert_torch_weights.py", checkpoint, tmp_path / "model", "--num-classes", "10")
    assert (code, out) == (2, "")
    assert err.startswith("error: this is no tnt_ti_patch16_224 as huawei names it; nothing was converted:")
    assert not (tmp_path / "model").exists()


def test_an_existing_destination_is_kept_unless_told_otherwise(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "model", num_classes=10)
    with pytest.raises(InputError, match="model exists"):
        convert(checkpoint, tmp_path / "model", num_classes=10)
    convert(checkpoint, tmp_path / "model", num_classes=0, overwrite=True)
    assert tnt_jax.load_model(tmp_path / "model").config.num_classes == 0


def test_nothing_needs_pytorch(checkpoint, small, tmp_path, monkeypatch):
    torch.save(as_torch(small), tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    convert(checkpoint, tmp_path / "model", num_classes=10)
    model = tnt_jax.load_model(tmp_path / "model")
    export(model, tmp_path / "back.safetensors", "timm")
    convert(tmp_path / "a.pth", tmp_path / "other", num_classes=10)
    export(model, tmp_path / "back.pth", "timm")


@pytest.mark.parametrize(
    ("file", "layout", "message"),
    [
        ("a.pth", "mmpretrain", "mmpretrain has no official TNT, .* it can go to huawei or timm"),
        ("a.bin", "timm", r"a\.bin should end in \.safetensors or \.pth"),
        ("there.pth", "timm", r"there\.pth exists"),
        ("folder.pth", "timm", r"folder\.pth is a folder"),
    ],
)
def test_what_cannot_be_written_is_refused(file, layout, message, tmp_path):
    (tmp_path / "there.pth").touch()
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(InputError, match=message):
        export(small_model(), tmp_path / file, layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pth", "there.pth"]


def test_image_sizes_are_numbers_or_height_x_width():
    assert (parse_image_size("384"), parse_image_size("256x320")) == ((384, 384), (256, 320))
    for text in ("big", "256x", "0", "1x2x3", "-16"):
        with pytest.raises(InputError, match="should be a number such as 384"):
            parse_image_size(text)


def test_a_destination_that_cannot_be_written_is_an_input_error(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="model cannot be written"):
        convert(checkpoint, tmp_path / "file" / "model", num_classes=10)


def test_options_for_reading_are_refused_when_writing(tmp_path):
    tnt_jax.save_model(small_model(), tmp_path / "model")
    code, _, err = commands.run(
        "convert_torch_weights.py", tmp_path / "model", tmp_path / "a.pth", "--to", "timm", "--num-classes", "3"
    )
    assert code == 2
    assert "--num-classes is for writing a model folder" in err
