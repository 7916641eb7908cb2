"""Configurations and data that mean nothing, drawn at random with fixed seeds: each is refused with a message."""

import contextlib
import dataclasses
import io
import json
import pathlib
import random
import struct

import numpy as np
import pytest

from tnt_jax.config import DataConfig, InputError, ModelChanges, TrainConfig, check
from tnt_jax.data.check import check_splits, content_of
from tnt_jax.data.opening import open_split
from tnt_jax.models.variants import complete
from tnt_jax.storage.description import from_json, to_json
from tnt_jax.storage.run import by_role, read_config

ODD = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 2**31, 2**63, -(2**70), 0.0, 0.5, 1.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), -float("inf"), "", "1", "none", "auto", "float32", "digits", "\0", "a" * 5000, "\udcff",
    b"", b"1", (), (1,), (1, 2), (2, 1), (0.5, 0.1), (-1, 1), (1, 2, 3, 4), ("a",), [], [1], {}, {"a": 1}, set(),
    object(), np.int64(4), np.float32(0.5), np.zeros(3),
)  # fmt: skip


def replaced(config, chance: random.Random):
    """A few fields of a configuration with values of any kind."""
    fields = [field.name for field in dataclasses.fields(config)]
    for name in chance.sample(fields, min(len(fields), chance.randint(1, 3))):
        value = getattr(config, name)
        inside = dataclasses.is_dataclass(value) and chance.random() < 0.9
        config = dataclasses.replace(config, **{name: replaced(value, chance) if inside else chance.choice(ODD)})
    return config


@pytest.mark.parametrize("seed", range(5))
def test_no_field_has_a_value_that_is_a_traceback(seed):
    chance, messages = random.Random(seed), []
    for _ in range(400):
        config = replaced(TrainConfig(model=ModelChanges(num_classes=10)), chance)
        try:
            check(config)
            by_role(complete(config, 10))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert all(messages)
    assert not any("\n" in message for message in messages)


def mangled(values, chance: random.Random):
    """JSON in which something was left out, added, or replaced."""
    if not isinstance(values, dict) or chance.random() < 0.1:
        return chance.choice([None, 1, "text", [], {}, [1, 2], -1.5, True])
    name = chance.choice(list(values))
    kind = chance.randrange(4)
    if kind == 0:
        return {key: value for key, value in values.items() if key != name}
    if kind == 1:
        return values | {"unknown": 1}
    return values | {name: mangled(values[name], chance)}


@pytest.mark.parametrize("seed", range(5))
def test_no_config_json_is_a_traceback(seed, tmp_path):
    chance = random.Random(seed)
    whole = to_json(complete(TrainConfig(), 10))
    path = tmp_path / "config.json"
    for _ in range(200):
        text = json.dumps(mangled(whole, chance))
        path.write_text(text if chance.random() < 0.7 else text[: chance.randrange(len(text))])
        with contextlib.suppress(InputError):
            from_json(json.loads(text))
        with contextlib.suppress(InputError):
            check(read_config(tmp_path))


def noise(chance: random.Random) -> bytes:
    """A file of a data source: whole, cut off, with other sizes, or noise."""
    images = struct.pack(">HBB3I", 0, 8, 3, 4, 2, 2) + bytes(16)
    labels = struct.pack(">HBBI", 0, 8, 1, 4) + bytes([0, 1, chance.randrange(256), 0])
    array = io.BytesIO()
    np.save(array, np.arange(12).reshape(3, 2, 2))
    table = b"image,label,split\ntrain/a/1.png,a,train\ntrain/b/1.jpg,b,test\n"
    kinds = [images, labels, b"", b"text\n", b"a\nb\n", chance.randbytes(40), table, table, array.getvalue()]
    content = bytearray(chance.choice(kinds))
    for _ in range(chance.randrange(3)):
        if content:
            content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content[: chance.randrange(len(content) + 1)] if chance.random() < 0.3 else content)


NAMES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
    "train-images-idx3-ubyte.gz", "train/a/1.png", "train/b/1.jpg", "test/a/1.png", "test/labels.txt", "val/a/x.gif",
    "dataset_info.json", "features.json", "table.csv", "table.parquet", "train_images.npy", "train_labels.npy", "a.npz",
)  # fmt: skip
KINDS = ("idx", "folder", "csv", "npy", "array_record", "digits", "synthetic", "tfds", "nothing", "")


@pytest.mark.parametrize("seed", range(5))
def test_no_files_and_no_name_of_a_source_are_a_traceback(seed, tmp_path):
    chance = random.Random(seed)
    for turn in range(60):
        folder = pathlib.Path(tmp_path / str(turn))
        folder.mkdir()
        for name in chance.sample(NAMES, chance.randint(1, 8)):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise(chance))
        kinds = (f"idx:{folder}", f"folder:{folder}", f"array_record:{folder}", f"npy:{folder}", f"npy:{folder}/a.npz")
        spec = chance.choice((*kinds, f"csv:{folder}/table.csv", f"csv:{folder}/table.parquet"))
        if chance.random() < 0.3:
            spec = chance.choice(KINDS) + chance.choice((":", "", "::", f":{folder}", ":-1", ":1e3", ":5"))
        splits = [chance.choice(("train", "test", "validation", "", "train[:0]")) for _ in range(2)]
        with contextlib.suppress(InputError):
            sources = [open_split(DataConfig(spec), split) for split in splits]
            check_splits(*sources, DataConfig(spec, *splits), 1)
            assert all(map(content_of, sources))
