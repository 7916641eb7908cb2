"""A batch is a function of (seed, step) for every source and depth, whatever the number of processes and workers."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tnt_jax.config import DataConfig
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import eval_batches, train_batches

COUNT, CHANNELS = 24, {"npy16": 5, "npyfloat": 2, "npz": 1, "hf": 3, "csv": 3, "fold": 3, "several": 3, "holdout": 3}
FEED = {"image_size": (12, 16), "batch_size": 8}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    import datasets

    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    labels = np.arange(COUNT) % 3
    for name, images in (
        ("npy16", rng.integers(0, 65536, (COUNT, 20, 18, 5), dtype=np.uint16)),
        ("npyfloat", rng.random((COUNT, 15, 21, 2), np.float32)),
    ):
        (folder / name).mkdir()
        for split in ("train", "test"):
            np.save(folder / name / f"{split}_images.npy", images)
            np.save(folder / name / f"{split}_labels.npy", labels)
    grey = rng.integers(0, 256, (COUNT, 14, 14), dtype=np.uint8)
    np.savez(folder / "grey.npz", x_train=grey, y_train=labels, x_test=grey, y_test=labels)
    pictures = [Image.fromarray(each) for each in rng.integers(0, 256, (COUNT, 17, 13, 3), dtype=np.uint8)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    rows = "".join(f"{number}.png,{number % 3},{number % 2}|{number % 3}\n" for number in range(COUNT))
    (folder / "mine.csv").write_text(f"image,label,labels\n{rows}")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    made = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(folder / "hf")
    csv = f"csv:{folder / 'mine.csv'}"
    return {
        "npy16": DataConfig(f"npy:{folder / 'npy16'}"),
        "npyfloat": DataConfig(f"npy:{folder / 'npyfloat'}", white=1.0),
        "npz": DataConfig(f"npy:{folder / 'grey.npz'}"),
        "hf": DataConfig(f"hf:{folder / 'hf'}"),
        "csv": DataConfig(csv, holdout=0.34, depth="uint16"),
        "holdout": DataConfig(csv, holdout=0.34),
        "fold": DataConfig(csv, fold="2/3", depth="float32"),
        "several": DataConfig(csv, task="multi_label", label_columns=("labels",), fold="1/3"),
    }


def read(batches, count):
    found = [{name: part.copy() for name, part in next(batches).items()} for _ in range(count)]
    batches.close()
    return found


MARKS = {"npy16": (), "hf": pytest.mark.slow, "csv": pytest.mark.slow, "several": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.nightly)) for name in CHANNELS])
def test_batches_do_not_depend_on_processes_and_workers(name, sources):
    data = dataclasses.replace(sources[name], repeats=1)
    train, test = (open_split(data, split) for split in ("train", None))
    feed = FEED | {"channels": CHANNELS[name]}
    whole = read(train_batches(train, data, **feed, seed=3), 4)
    evaluated = read(eval_batches(test, data, **feed), 1)
    assert whole[0]["image"].dtype == {"npy16": "uint16", "npyfloat": "float32"}.get(name, data.depth or "uint8")
    assert whole[0]["label"].shape == ((8, 3) if name == "several" else (8,))
    for processes, workers in ((1, 2), (2, 0), (4, 0), (2, 1)):
        again = dataclasses.replace(data, num_workers=workers)
        size = feed["batch_size"] // processes
        shares = [feed | {"rows": range(index * size, (index + 1) * size)} for index in range(processes)]
        parts = [read(train_batches(train, again, **share, seed=3), 4) for share in shares]
        tests = [read(eval_batches(test, again, **share), 1) for share in shares]
        for expected, found in ((whole, parts), (evaluated, tests)):
            for step, batch in enumerate(expected):
                for key, value in batch.items():
                    joined = np.concatenate([part[step][key] for part in found])
                    assert joined.dtype == value.dtype
                    np.testing.assert_array_equal(joined, value)
    resumed = read(train_batches(train, data, **feed, seed=3, start_step=2), 2)
    np.testing.assert_array_equal(resumed[1]["image"], whole[3]["image"])
