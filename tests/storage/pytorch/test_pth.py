"""Files of torch.save, read without PyTorch: what PyTorch itself reads, and nothing that a file says is run."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_files

from tnt_jax.storage.torch.pth import Tensor, UnsupportedTensor, read_pth
from tnt_jax.storage.torch.unpickle import Damaged, Inert, unpickle

FILES = Path(__file__).parent / "files"
TENSORS = 33


def compare(theirs, ours, place=""):
    """Asserts that everything is equal, tensors bit for bit, and counts the tensors."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, Tensor), place
        array = ours.numpy()
        assert (tuple(theirs.shape), str(theirs.dtype)) == (array.shape, f"torch.{array.dtype.name}"), place
        bits = theirs.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.ascontiguousarray(array).reshape(-1).view(np.uint8), bits, err_msg=place)
        return 1
    if isinstance(theirs, dict):
        assert list(theirs) == list(ours), place
        return sum(compare(theirs[key], ours[key], f"{place}/{key}") for key in theirs)
    if isinstance(theirs, list | tuple):
        assert (type(theirs), len(theirs)) == (type(ours), len(ours)), place
        return sum(compare(*pair, f"{place}[]") for pair in zip(theirs, ours, strict=True))
    if isinstance(theirs, argparse.Namespace):
        assert (ours.name, ours.state) == ("argparse.Namespace", vars(theirs)), place
        return 0
    assert (theirs, type(theirs)) == (ours, type(ours)), place
    return 0


@pytest.mark.parametrize("file", sorted(path.name for path in FILES.glob("*.pth")))
def test_files_of_pytorch_1_13_are_read_as_pytorch_reads_them(file):
    assert compare(torch.load(FILES / file, weights_only=False), read_pth(FILES / file)) == TENSORS


@pytest.mark.parametrize("kind", ["zip", "legacy", "p3", "p4", "p5"])
def test_files_of_this_pytorch_are_read_as_pytorch_reads_them(kind, tmp_path):
    torch_files.write(tmp_path, "")
    path = tmp_path / f"torch-{kind}.pth"
    assert compare(torch.load(path, weights_only=False), read_pth(path)) == TENSORS


def test_every_dtype_that_pytorch_saves_is_read_or_named(tmp_path):
    names = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex128", "int8"]
    torch.save({name: torch.ones(3, 2).to(getattr(torch, name)) for name in names}, tmp_path / "a.pth")
    assert compare(torch.load(tmp_path / "a.pth"), read_pth(tmp_path / "a.pth")) == len(names)


def test_tensors_share_their_storage_and_lie_in_the_file(tmp_path):
    base = torch.arange(6.0)
    torch.save({"base": base, "tail": base[2:], "turned": base.reshape(2, 3).t()}, tmp_path / "a.pth")
    read = read_pth(tmp_path / "a.pth")
    assert read["base"].storage is read["tail"].storage is read["turned"].storage
    assert not read["tail"].numpy().flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        read["tail"].numpy()[0] = 1


def test_what_has_no_plain_array_is_named(tmp_path):
    torch.save(
        {
            "meta": torch.ones(2, device="meta"),
            "sparse": torch.eye(2).to_sparse(),
            "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        },
        tmp_path / "a.pth",
    )
    read = read_pth(tmp_path / "a.pth")
    assert all(isinstance(value, UnsupportedTensor) for value in read.values())
    assert [value.why.split()[0] for value in read.values()] == ["without", "sparse", "conjugated"]


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch owned",)


class Strange:
    def __setstate__(self, state):
        raise AssertionError("was run")

    def __getstate__(self):
        return {"deep": [1]}


def test_nothing_is_run_and_what_would_be_is_inert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "code": RunsCode(),
        "numpy": np.float64(1.5),
        "array": np.ones(2),
        "strange": Strange(),
        "path": Path("a"),
    }
    torch.save({**values, "epoch": 3}, "a.pth")
    read = read_pth(Path("a.pth"))
    assert read.pop("epoch") == 3
    assert all(isinstance(value, Inert) for value in read.values())
    assert read["code"].name in ("posix.system", "nt.system")
    assert read["strange"].state == {"deep": [1]}
    assert os.listdir() == ["a.pth"]


def test_a_dictionary_in_itself_and_one_that_is_very_deep_are_read(tmp_path):
    cycle = {}
    cycle["self"] = cycle
    torch.save(cycle, tmp_path / "a.pth")
    read = read_pth(tmp_path / "a.pth")
    assert read["self"] is read
    deep = pickle.EMPTY_LIST * 200_000 + pickle.APPEND * 199_999 + b"."
    value, end = unpickle(memoryview(deep), 0, {}, lambda identity: identity)
    assert (len(value), end) == (1, len(deep))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\x80\x02.", "takes more from its stack"),
        (b"\x80\x02}q\x00", "is cut off"),
        (b"\x80\x02h\x07.", "refers to object 7 of itself"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "cut off in a text"),
        (b"\x80\x02}]K\x01s.", "has a key that is no plain value"),
        (b"\x80\x02K\x01K\x02K\x03s.", "sets items on something that is not a dictionary"),
        (b"\x80\x02K\x01)R.", "calls something that is not a function"),
        (b"\x80\x02I1\n.", "is no opcode of protocols 2 to 5"),
        (b"\x80\x02K\x01K\x01.", "ends in the middle"),
        (b"\x80\x02(t(.", "has a mark where an object should be"),
    ],
)
def test_a_pickle_that_contradicts_itself_is_damaged(text, message):
    with pytest.raises(Damaged, match=message):
        unpickle(memoryview(text), 0, {}, lambda identity: identity)


def test_archives_that_torch_did_not_write_are_named(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photos/a.jpg", b"")
    with pytest.raises(Damaged, match=r"without data\.pkl"):
        read_pth(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(Damaged, match="TorchScript"):
        read_pth(path)
    torch.save({"a": torch.ones(3)}, tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "b.pth") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    with pytest.raises(Damaged, match="in it is compressed"):
        read_pth(path)
