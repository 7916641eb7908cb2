"""Checkpoints that are damaged or hostile, by a seed, and what becomes of them."""

import io
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from tnt_jax.config import InputError
from tnt_jax.storage.load import open_model
from tnt_jax.storage.torch.write import export

SLOWEST = 10.0  # seconds


def originals(model, folder):
    """A model's own files, and one as PyTorch before 1.6 wrote it: kind -> bytes."""
    export(model, folder / "original.pth", "timm")
    export(model, folder / "original.safetensors", "timm")
    saved = torch.load(folder / "original.pth")
    torch.save(saved, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    names = {"zip": "original.pth", "legacy": "legacy.pth", "safetensors": "original.safetensors"}
    return {kind: (folder / name).read_bytes() for kind, name in names.items()}


def mutated(seed, files):
    """The kind of file, what was done to it, and its bytes."""
    rng = np.random.default_rng(seed)
    kind = list(files)[seed % len(files)]
    names = {
        "zip": ("flip", "cut", "grow", "pickle", "bomb", "names", "cycle", "shape", "shared", "deep", "long"),
        "legacy": ("flip", "cut", "grow", "pickle"),
    }
    what = rng.choice(names.get(kind, ("flip", "cut", "grow", "header")))
    return kind, str(what), _MUTATIONS[what](rng, files[kind])


def _flip(rng, content):
    damaged = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
    return bytes(damaged)


def _cut(rng, content):
    return content[: rng.integers(len(content))]


def _grow(rng, content):
    at = rng.integers(len(content))
    return content[:at] + rng.bytes(rng.integers(1, 200)) + content[at:]


def _pickle(rng, content):
    """Bytes of the pickle changed, with a right checksum around them."""
    if content[:2] != b"PK":
        at = 150 + int(rng.integers(2000))
        return content[:at] + bytes([int(rng.integers(256))]) + content[at + 1 :]
    entries = _entries(content)
    damaged = bytearray(entries["archive/data.pkl"])
    for _ in range(rng.integers(1, 4)):
        damaged[rng.integers(len(damaged))] = rng.integers(256)
    return _archive(entries | {"archive/data.pkl": bytes(damaged)})


def _bomb(rng, content):
    entries = _entries(content)
    name = "archive/data.pkl" if rng.random() < 0.5 else "archive/data/0"
    return _archive(entries | {name: bytes(50_000_000)}, compressed=name)


def _names(rng, content):
    """A storage that is asked for by a name that leads out of the archive."""
    entries = _entries(content)
    old = pickle.BINUNICODE + struct.pack("<I", 1) + b"0"
    away = b"../../../etc/passwd"
    changed = entries["archive/data.pkl"].replace(old, pickle.BINUNICODE + struct.pack("<I", len(away)) + away)
    return _archive(
        entries | {"archive/data.pkl": changed, "archive/data/../../../etc/passwd": entries["archive/data/0"]}
    )


def _cycle(rng, content):
    """Dictionaries in themselves, or dictionaries a hundred thousand deep."""
    value = {}
    value["state_dict"] = value
    value["model"] = [value]
    text = pickle.dumps(value, protocol=2)
    if rng.random() < 0.5:
        depth = int(rng.integers(1, 100_000))
        key = pickle.BINUNICODE + struct.pack("<I", 1) + b"a"
        text = b"\x80\x02" + (pickle.EMPTY_DICT + key) * depth + pickle.EMPTY_DICT + pickle.SETITEM * depth + b"."
    return _archive(_entries(content) | {"archive/data.pkl": text})


def _shared(rng, content):
    """A tuple of the same tuple twice, and so on: a few hundred bytes that would be printed as 2**60 brackets."""
    inner = pickle.EMPTY_TUPLE
    for level in range(60):
        inner += pickle.BINPUT + bytes([level]) + pickle.BINGET + bytes([level]) + pickle.TUPLE2
    return _instead_of_a_tensor(rng, content, inner)


def _deep(rng, content):
    return _instead_of_a_tensor(rng, content, pickle.EMPTY_TUPLE + pickle.TUPLE1 * int(rng.integers(1, 200_000)))


def _long(rng, content):
    """An integer of thousands of digits, as a key or as a value."""
    number = pickle.LONG4 + struct.pack("<I", 3000) + b"\x7f" * 3000
    if rng.random() < 0.5:
        return _archive({"archive/data.pkl": b"\x80\x02}" + number + b"}s."})
    return _instead_of_a_tensor(rng, content, number)


def _instead_of_a_tensor(rng, content, value):
    """A state dict whose only tensor is a value, or is made of it by a function."""
    name = "blocks.0.attn_out.qk.weight"
    if rng.random() < 0.5:
        made = pickle.GLOBAL + b"torch._tensor\n_rebuild_from_type_v2\n"
        value = made + value + pickle.NONE * 2 + pickle.TUPLE3 + pickle.REDUCE
    key = pickle.BINUNICODE + struct.pack("<I", len(name)) + name.encode()
    text = b"\x80\x02" + pickle.EMPTY_DICT + key + value + pickle.SETITEM + pickle.STOP
    return _archive(_entries(content) | {"archive/data.pkl": text})


def _shape(rng, content):
    """A tensor that says it is much larger than it is."""
    entries = _entries(content)
    huge = struct.pack("<i", int(rng.choice([-1, 2**31 - 1, 2**24, 10**6])))
    old = pickle.BININT + struct.pack("<i", int(rng.choice([12, 16, 4, 1])))
    parts = entries["archive/data.pkl"].split(old)
    if len(parts) > 1:
        at = int(rng.integers(1, len(parts)))
        parts[at - 1 : at + 1] = [parts[at - 1] + pickle.BININT + huge + parts[at]]
    return _archive(entries | {"archive/data.pkl": old.join(parts)})


def _header(rng, content):
    """Another number in the JSON of a .safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    fields = json.loads(content[8 : 8 + size])
    name = str(rng.choice([name for name in fields if name != "__metadata__"]))
    change = [{"shape": [2**40, 2**40]}, {"data_offsets": [0, 2**60]}, {"dtype": "F8_E4M3"}, {"shape": []}]
    fields[name] |= change[rng.integers(len(change))]
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


_MUTATIONS = {
    "flip": _flip,
    "cut": _cut,
    "grow": _grow,
    "pickle": _pickle,
    "bomb": _bomb,
    "names": _names,
    "cycle": _cycle,
    "shape": _shape,
    "shared": _shared,
    "deep": _deep,
    "long": _long,
    "header": _header,
}


def _entries(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(entries, compressed=None):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED)
    return file.getvalue()


def outcome(path, kind, expected):
    """`refused` with a message, or `right`: what the model had, or what PyTorch reads.

    Raises whatever else happens: another error, other numbers, or more time than there is.
    """
    started = time.perf_counter()
    try:
        opened = open_model(path)
        result = "right"
    except InputError:
        result = "refused"
    assert time.perf_counter() - started < SLOWEST
    if result == "right":
        for name, value in opened.parameters.items():
            if not np.array_equal(value, expected.get(name)):
                _as_others_read(path, kind)
                break
    return result


def _by_torch(path):
    """What PyTorch reads, whatever device the file names and whether a gradient is wanted."""
    saved = torch.load(path, weights_only=True, map_location=lambda storage, _: storage)
    return {name: tensor.detach() for name, tensor in saved.items()}


def _as_others_read(path, kind):
    """Compares every tensor with what PyTorch or safetensors reads; a file may be another one and still be whole."""
    from tnt_jax.storage.torch.read import read_file

    tensors = read_file(Path(path)).tensors
    theirs = safetensors.numpy.load_file(path) if kind == "safetensors" else _by_torch(path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), np.asarray(theirs[name]), err_msg=name)
