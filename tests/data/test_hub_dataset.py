"""`hf:OWNER/NAME` from a hub on this machine, in a process of its own, since the library reads its address once."""

import dataclasses
import io
import os
import subprocess
import sys
import tracemalloc

import datasets
import numpy as np
import pytest
from commands import ROOT
from loopback import Datasets
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.opening import open_split

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


BIRD = datasets.ClassLabel(names=["coot", "heron", "ibis"])
SEVERAL = datasets.Sequence(datasets.ClassLabel(names=["coot", "heron", "ibis"]))


def saved(folder, feature, train, test, column="label"):
    """A folder that `save_to_disk` wrote, with the labels of three training and two test images."""
    features = datasets.Features({"image": datasets.Array3D((4, 4, 3), "uint8"), column: feature})
    images = np.zeros((3, 4, 4, 3), np.uint8)
    of_split = {"train": {"image": images, column: train}, "test": {"image": images[:2], column: test}}
    splits = {name: datasets.Dataset.from_dict(rows, features) for name, rows in of_split.items()}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("task", "feature", "train", "test", "names", "targets"),
    [
        ("single_label", datasets.Value("string"), ["b10", "b9", "a"], ["b10", "b9"], ("a", "b9", "b10"), [2, 1]),
        ("single_label", datasets.Value("int64"), [5, 10, 7], [10, 5], ("5", "7", "10"), [2, 0]),
        (
            "multi_label",
            datasets.Value("string"),
            ["b|a", "", "c"],
            ["c", "b| a"],
            tuple("abc"),
            [[0, 0, 1], [1, 1, 0]],
        ),
        ("multi_label", SEVERAL, [[0], [], [1]], [[1], []], ("coot", "heron", "ibis"), [[0, 1, 0], [0, 0, 0]]),
        ("regression", datasets.Value("float64"), [0.5, 1.5, 2.5], [3.5, -1.0], ("label",), [[3.5], [-1.0]]),
    ],
)
def test_labels_of_every_kind_are_numbered_as_the_training_images_have_them(
    task, feature, train, test, names, targets, tmp_path
):
    found = open_split(DataConfig(saved(tmp_path, feature, train, test), task=task), "test")
    assert found.class_names == names
    np.testing.assert_array_equal(found.targets, targets)


@pytest.mark.parametrize(
    ("task", "feature", "test", "message"),
    [
        (
            "single_label",
            datasets.Value("string"),
            ["a", "d"],
            r"test, row 1: no training image has label 'd'; --data.other-classes",
        ),
        ("single_label", SEVERAL, [[0], [1]], "has lists, which fit --data.task multi_label, and not"),
        ("multi_label", SEVERAL, [[2], []], "split 'test' has classes that no training image has: ibis"),
        ("regression", datasets.Value("float64"), [1.0, np.nan], "test, row 1: the cell of 'label' is empty"),
        ("regression", datasets.Value("float64"), [1.0, np.inf], "test, row 1: the cell of 'label' is 'inf'"),
        ("single_label", datasets.Value("string"), ["a", None], "test, row 1: the cell of 'label' is empty"),
        ("single_label", datasets.Value("string"), ["a", " "], "test, row 1: the cell of 'label' is empty"),
        ("single_label", datasets.Value("int64"), [1, None], "test, row 1: the cell of 'label' is empty"),
        ("single_label", BIRD, [1, None], "test, row 1: the cell of 'label' is empty"),
        ("single_label", BIRD, [1, -1], "test, row 1: label '-1' in column 'label' is none of the 3 classes"),
        ("multi_label", SEVERAL, [[1], None], "test, row 1: the cell of 'label' is empty"),
        ("multi_label", SEVERAL, [[1], [0, None]], "test, row 1: the cell of 'label' is empty"),
        ("multi_label", datasets.Value("string"), ["a", None], "test, row 1: the cell of 'label' is empty"),
    ],
)
def test_labels_that_do_not_fit_are_named(task, feature, test, message, tmp_path):
    train = {"string": ["a", "b", "c"], "int64": [1, 2, 0], "float64": [1.0, 2.0, 3.0]}
    source = saved(tmp_path, feature, [[0], [1], []] if feature is SEVERAL else train[feature.dtype], test)
    with pytest.raises(InputError, match=message):
        open_split(DataConfig(source, task=task), "test")


def test_of_a_row_the_image_alone_is_read(tmp_path):
    """Another column may hold what cannot be decoded, or takes long."""
    features = {"image": datasets.Image(), "label": BIRD, "mask": datasets.Image()}
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (7, 0, 0)).save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": None}] * 2
    masks = [{"bytes": b"no image", "path": None}] * 2
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1], "mask": masks}, datasets.Features(features))
    rows.save_to_disk(str(tmp_path / "rows"))
    pixels, label = open_split(DataConfig(f"hf:{tmp_path}/rows"), "train")[1]
    assert pixels[0, 0].tolist() == [7, 0, 0]
    assert label == 1


@pytest.mark.parametrize("disabled", [False, True])
def test_whether_datasets_shows_bars_is_left_as_it_was(disabled, tmp_path):
    source = saved(tmp_path, BIRD, [0, 1, 0], [1, 0])
    try:
        (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()
        open_split(DataConfig(source), "train")
        assert datasets.are_progress_bars_disabled() is disabled
    finally:
        datasets.enable_progress_bars()


def test_a_column_that_is_missing_is_named(tmp_path):
    source = saved(tmp_path, datasets.Value("string"), ["a", "b", "c"], ["a", "b"], column="species")
    with pytest.raises(InputError, match=r"no column 'label' .*; it has 'species': name one .*--data.label-columns"):
        open_split(DataConfig(source), "test")
    assert open_split(DataConfig(source, label_columns=("species",)), "test").targets.tolist() == [0, 1]


def table_of(folder, rows, **columns):
    """A folder with training images alone, and columns of what is told of them."""
    images = np.arange(rows, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    kinds = {
        name: datasets.Value("string" if isinstance(values[0], str) else "float32") for name, values in columns.items()
    }
    features = datasets.Features({"image": datasets.Array3D((4, 4, 3), "uint8"), **kinds})
    datasets.Dataset.from_dict({"image": images, **columns}, features).save_to_disk(str(folder))
    return f"hf:{folder}"


def test_groups_folds_and_weights_are_those_of_a_table(tmp_path):
    patients = [f"p{row // 3}{' ' * (row % 2)}" for row in range(12)]
    columns = {"label": ["a", "b"] * 6, "patient": patients, "part": [str(row % 10) for row in range(12)]}
    source = table_of(tmp_path, 12, **columns, often=[0.0, 1.0, 2.0, 3.0] * 3)
    data = DataConfig(source, group_column="patient", weight_column="often", holdout=0.34)
    for seed in range(5):
        train, test = (open_split(dataclasses.replace(data, split_seed=seed), split) for split in ("train", None))
        rows = [[int(part[index][0][0, 0, 0]) for index in range(len(part))] for part in (train, test)]
        assert sorted(rows[0] + rows[1]) == list(range(12))
        assert not {row // 3 for row in rows[0]} & {row // 3 for row in rows[1]}
        assert train.weights.tolist() == [row % 4 for row in rows[0]]
    fold = open_split(DataConfig(source, fold_column="part", fold="3/10"), None)
    assert [int(fold[index][0][0, 0, 0]) for index in range(len(fold))] == [2]
    with pytest.raises(InputError, match="has no column 'ward'; it has 'label', 'patient', 'part', 'often'"):
        open_split(DataConfig(source, group_column="ward"), "train")


def test_the_labels_of_many_images_take_no_more_than_their_numbers(tmp_path):
    labels = [f"class {row % 3000}" for row in range(6000)]
    source = table_of(tmp_path, 6000, label=labels)
    open_split(DataConfig(source), "train")
    tracemalloc.start()
    found = open_split(DataConfig(source), "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.targets.dtype == np.int32
    assert [found.class_names[target] for target in found.targets] == labels
    assert peak < 6e6  # a row of all classes for each image would take 72
