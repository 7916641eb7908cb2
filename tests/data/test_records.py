import dataclasses
import io
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data import prepare
from tnt_jax.data.check import check_splits, content_of
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import train_batches
from tnt_jax.data.records import RecordImages
from tnt_jax.data.sources import Split

CLASSES = ("n01", "n02", "n03")
ARCHIVES = prepare.Archives(CLASSES, ("n03", "n01", "n01", "n02", "n03"), train_count=7, shard_size=2)
COUNTS = {"n01": 3, "n02": 1, "n03": 3}


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(file, "JPEG", quality=95)
    return file.getvalue()


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def make_train(path, counts=COUNTS):
    with tarfile.open(path, "w") as archive:
        for label, (class_name, count) in reversed(list(enumerate(counts.items()))):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for index in reversed(range(count)):
                    add(images, f"{class_name}_{index}.JPEG", jpeg((80 * label, 20 * index, 0)))
            add(archive, f"{class_name}.tar", inner.getvalue())


@pytest.fixture
def tars(tmp_path):
    train, val = tmp_path / "train.tar", tmp_path / "val.tar"
    make_train(train)
    with tarfile.open(val, "w") as archive:
        for index in reversed(range(5)):
            add(archive, f"ILSVRC2012_val_{index}.JPEG", jpeg((0, 0, 50 * index)))
    return str(train), str(val), str(tmp_path / "out")


def test_the_archives_become_records_that_can_be_read(tars):
    folder = prepare.prepare_imagenet(*tars, ARCHIVES, name="small_imagenet")
    train, test = (open_split(DataConfig(f"array_record:{folder}"), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == CLASSES
    assert [train[index][1] for index in range(7)] == [0, 0, 0, 1, 2, 2, 2]
    assert [test[index][1] for index in range(5)] == [2, 0, 0, 1, 2]
    for index in range(5):
        assert abs(int(test[index][0][0, 0, 2]) - 50 * index) < 4
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(again[3][0], train[3][0])
    assert "tensorflow" not in sys.modules


def test_records_are_recognised_by_their_shards_wherever_they_lie(tars, tmp_path):
    """A run does not go on with others, though the labels in them are not read for that."""

    def digest(folder, split="train"):
        return content_of(open_split(DataConfig(f"array_record:{folder}"), split))["records"]

    folder = prepare.prepare_imagenet(*tars, ARCHIVES, name="small_imagenet")
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert digest(folder) == digest(tmp_path / "elsewhere")
    make_train(tars[0], {"n01": 2, "n02": 2, "n03": 3})  # one image is of another class
    of_others = [
        prepare.prepare_imagenet(*tars[:2], str(tmp_path / "other"), ARCHIVES, name="small_imagenet"),
        prepare.prepare_imagenet(
            *tars[:2], str(tmp_path / "shards"), dataclasses.replace(ARCHIVES, shard_size=4), name="small_imagenet"
        ),
    ]
    found = [digest(folder), digest(folder, "train[:4]"), digest(folder, "validation"), *map(digest, of_others)]
    assert len(set(found)) == len(found)


def test_tfds_reads_them_by_name_and_by_slices(tars, monkeypatch):
    prepare.prepare_imagenet(*tars, ARCHIVES, name="small_imagenet")
    real = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: real(name, data_dir=tars[2]))
    assert len(open_split(DataConfig("tfds:small_imagenet"), "train[:4]")) == 4
    assert [open_split(DataConfig("tfds:small_imagenet"), "train[50%:]")[index][1] for index in range(3)] == [2, 2, 2]
    with pytest.raises(InputError, match="no split 'nonsense'; there are 'train', 'validation'"):
        open_split(DataConfig("tfds:small_imagenet"), "nonsense")
    with pytest.raises(InputError, match="TFDS knows no dataset 'nothing_of_that_name'"):
        open_split(DataConfig("tfds:nothing_of_that_name"), "train")


def test_what_is_not_prepared_or_not_array_record_is_said(tmp_path, monkeypatch):
    real = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: real(name, data_dir=str(tmp_path)))
    with pytest.raises(InputError, match="tfds:cifar10 is not prepared"):
        open_split(DataConfig("tfds:cifar10"), "train")
    with pytest.raises(InputError, match="holds no dataset: dataset_info"):
        open_split(DataConfig(f"array_record:{tmp_path}"), "train")


def test_tfrecord_gets_the_command_that_converts_it(tars, monkeypatch):
    folder = prepare.prepare_imagenet(*tars, ARCHIVES, name="small_imagenet")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array"):
        open_split(DataConfig(f"array_record:{folder}"), "train")


def test_a_stopped_run_goes_on_where_it_was(tars, monkeypatch):
    real, written = prepare._write, []

    def stop_at_the_third(shard, info):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.path)
        return real(shard, info)

    monkeypatch.setattr(prepare, "_write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_imagenet(*tars, ARCHIVES)
    before = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(prepare, "_write", real)
    with pytest.raises(InputError, match="holds no dataset"):
        open_split(DataConfig(f"array_record:{written[0].parent}"), "train")
    folder = prepare.prepare_imagenet(*tars, ARCHIVES)
    assert {path: path.stat().st_mtime_ns for path in written} == before
    assert len(open_split(DataConfig(f"array_record:{folder}"), "train")) == 7


def test_archives_that_hold_something_else_are_refused(tars, tmp_path):
    train, val, out = tars
    make_train(train, {"n01": 3, "n02": 1})
    with pytest.raises(InputError, match="should hold an archive for each of 3 classes, and differs in 1: n03"):
        prepare.prepare_imagenet(train, val, out, ARCHIVES)
    make_train(train, {**COUNTS, "n02": 2})
    with pytest.raises(InputError, match="8 train images were found, and there should be 7"):
        prepare.prepare_imagenet(train, val, out, ARCHIVES)
    with pytest.raises(InputError, match="cannot be read as a tar archive"):
        prepare.prepare_imagenet(train, str(tmp_path / "missing.tar"), out, ARCHIVES)
    with pytest.raises(InputError, match="holds 3 images, and there should be 5"):
        prepare.prepare_imagenet(train, train, out, ARCHIVES)


def test_the_lists_of_imagenet_are_complete():
    archives = prepare.imagenet_archives()
    assert len(archives.class_names) == len(set(archives.class_names)) == 1000
    assert list(archives.class_names) == sorted(archives.class_names)
    # 50 validation images of each class
    assert {archives.validation_classes.count(name) for name in archives.class_names} == {50}


def test_without_the_libraries_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(InputError, match="need array_record, which is not installed: pip install"):
        open_split(DataConfig("tfds:imagenet2012"), "train")


class Unlabelled:
    """What TFDS gives of a split whose labels are -1, such as ImageNet's test images."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": b"", "label": -1, "file_name": b"ILSVRC2012_test_00000001.JPEG"}


def test_a_split_without_labels_is_no_test_split():
    source = Split(RecordImages("tfds:imagenet2012 test", Unlabelled(), 2), None, ("a", "b"))
    with pytest.raises(InputError, match=r"has label -1: this split has no labels.*--data.eval-split validation"):
        check_splits(source, source, DataConfig("tfds:imagenet2012"), 3)


def test_a_full_disk_is_not_the_archives_fault(tars, monkeypatch):
    def full(shard, info):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_write", full)
    with pytest.raises(InputError, match=r"train images cannot be written into .*5.1.0: .*No space left on device"):
        prepare.prepare_imagenet(*tars, ARCHIVES)


def test_damaged_records_are_named_by_shard_and_place_and_may_be_skipped(tars, caplog):
    folder = prepare.prepare_imagenet(*tars, ARCHIVES, name="small_imagenet")
    shards = sorted(folder.glob("*train*"))
    whole = shards[2].read_bytes()
    data = DataConfig.plain(f"array_record:{folder}", skip_unreadable=0.5)
    feed = {"image_size": (8, 8), "channels": 3, "batch_size": 7, "seed": 0}
    for content in (whole[: len(whole) // 2], whole[:200] + bytes(400) + whole[600:]):
        shards[2].write_bytes(content)
        train = open_split(data, "train")
        with pytest.raises(InputError, match=rf"record [456] of .*, record [012] of {shards[2].name}, cannot"):
            [train[index] for index in range(7)]
        batch = next(train_batches(train, data, **feed))
        assert set(batch["label"]) <= {0, 1, 2}
        assert "skipped unreadable image" in caplog.text
    for name in ("dataset_info.json", "features.json"):
        path = folder / name
        before = path.read_text()
        path.write_text(before[: len(before) // 2])
        with pytest.raises(InputError, match=str(folder)):
            open_split(data, "train")
        path.write_text(before)
