"""Folders of images as people have them."""

import dataclasses
import os
import struct

import pytest
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.check import check_splits, content_of
from tnt_jax.data.listing import images_below
from tnt_jax.data.opening import open_reported, open_split


def write(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (colour, 0, 0)).save(path, "PNG")


def files_of(root, split="train", **fields):
    source = open_split(DataConfig(f"folder:{root}", **fields), split)
    return [f"{source.class_names[target]}:{name}" for name, target in zip(source.files, source.targets, strict=True)]


def test_hidden_files_are_no_images_and_what_is_left_out_is_said(tmp_path, caplog):
    for name in ("ant/1.png", "ant/.ipynb_checkpoints/1.png", "ant/.1.png", "bee/2.jfif", "bee/3.JPE", "bee/4.heic"):
        write(tmp_path / "train" / name)
    for name in ("notes.txt", "a.mp4", "b.mp4", "Thumbs.db"):
        (tmp_path / "train/ant" / name).touch()
    assert files_of(tmp_path) == ["ant:ant/1.png", "bee:bee/2.jfif", "bee:bee/3.JPE", "bee:bee/4.heic"]
    assert "left out what is no image: 2 .mp4, 1 .txt, 1 .db" in caplog.text.replace("1 .db, 1 .txt", "1 .txt, 1 .db")


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((), None),
        (("a.txt",), "1 .txt"),
        ((*(f"{number}.txt" for number in range(10)), "1.mp4", "2.mp4"), "10 .txt, 2 .mp4"),
    ],
)
def test_the_file_of_labels_is_not_among_what_is_left_out(others, said, tmp_path, caplog):
    for name in ("1.png", "2.png"):
        write(tmp_path / "train" / name)
    (tmp_path / "train/labels.txt").write_text("0\n1\n")
    (tmp_path / "names.txt").write_text("a\nb\n")
    for name in others:
        (tmp_path / "train" / name).touch()
    fields = {"class_names": str(tmp_path / "names.txt"), "other_classes": True}
    assert files_of(tmp_path, **fields) == ["a:1.png", "b:2.png"]
    found = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert found == ([f"{tmp_path}/train: left out what is no image: {said}"] if said else [])


def test_training_and_prediction_walk_alike(tmp_path):
    for name in ("ant/10.png", "ant/9.png", "ant/deep/1.png", "ant/2.png", "bee/b.png"):
        write(tmp_path / "train" / name)
    ours = [line.partition(":")[2] for line in files_of(tmp_path)]
    assert ours == [os.path.relpath(path, tmp_path / "train") for path in images_below(tmp_path / "train")]
    assert ours == ["ant/2.png", "ant/9.png", "ant/10.png", "ant/deep/1.png", "bee/b.png"]


def test_a_link_upwards_or_to_another_class_changes_no_class(tmp_path):
    write(tmp_path / "train/ant/1.png")
    write(tmp_path / "train/bee/2.png")
    (tmp_path / "train/ant/up").symlink_to("..")
    (tmp_path / "train/ant/other").symlink_to("../bee")
    assert files_of(tmp_path) == ["ant:ant/1.png", "bee:bee/2.png"]


def test_broken_links_are_named(tmp_path):
    write(tmp_path / "train/ant/1.png")
    (tmp_path / "train/ant/annexed.png").symlink_to("../nowhere.png")
    with pytest.raises(InputError, match=r"1 links to images lead nowhere: annexed.png"):
        files_of(tmp_path)
    assert len(files_of(tmp_path, skip_unreadable=0.5)) == 2
    source = open_split(DataConfig(f"folder:{tmp_path}", skip_unreadable=0.5), "train")
    with pytest.raises(InputError, match=r"annexed.png: it is a link to \.\./nowhere.png, which is not there"):
        source[1]


def test_a_class_folder_that_is_not_utf8_has_a_name_that_every_file_can_hold(tmp_path):
    for name in (b"caf\xe9", b"the"):
        write(tmp_path / os.fsdecode(b"train/" + name) / "1.png")
        write(tmp_path / os.fsdecode(b"val/" + name) / "1.png")
    train, test = (open_split(DataConfig(f"folder:{tmp_path}"), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("caf\\xe9", "the")
    assert train[0][0].shape == (6, 6, 3)
    assert content_of(train)["class names"] == content_of(test)["class names"]


def test_the_folders_of_classes_alone_are_training_images(tmp_path):
    for name in ("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png"):
        write(tmp_path / name)
    assert files_of(tmp_path) == ["ant:ant/1.png", "ant:ant/2.png", "bee:bee/1.png", "bee:bee/2.png"]
    for split in ("test", None):
        with pytest.raises(InputError, match=r"there is no split '\w+'; there are 'train'; --data.holdout 0.2"):
            open_split(DataConfig(f"folder:{tmp_path}"), split)
    assert len(files_of(tmp_path, None, holdout=0.5)) == len(files_of(tmp_path, holdout=0.5)) == 2
    (tmp_path / "notes").mkdir()  # a folder without images is no class, so these may be splits
    with pytest.raises(InputError, match="there is no split 'train'; there are 'ant', 'bee', 'notes'"):
        files_of(tmp_path)


def test_empty_files_are_found_before_training(tmp_path):
    for split in ("train", "val"):
        for number in range(4):
            write(tmp_path / f"{split}/ant/{number}.png")
    (tmp_path / "train/ant/2.png").write_bytes(b"")
    data = DataConfig(f"folder:{tmp_path}")

    def check(data):
        check_splits(*(open_split(data, split) for split in ("train", None)), data, 3)

    with pytest.raises(InputError, match=r"'train' .*: 1 of 4 files are empty: .*2.png; --data.skip-unreadable 0.25"):
        check(data)
    check(dataclasses.replace(data, skip_unreadable=0.25))
    (tmp_path / "val/ant/1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"'val' .*: 1 of 4 files are empty: .*val/ant/1.png; take them out"):
        check(dataclasses.replace(data, skip_unreadable=0.25))


@pytest.mark.parametrize(
    ("split", "fields", "chooses", "reported"),
    [
        (("train", "val", "test"), {}, "val", "test"),
        (("train", "Valid"), {}, "Valid", "Valid"),
        (("train", "test"), {}, "test", "test"),
        (("train", "test"), {"holdout": 0.5}, "holdout", "test"),
        (("train", "val", "test"), {"fold": "1/2"}, "fold 1/2", "fold 1/2"),
        (("train", "val", "test"), {"eval_split": "test"}, "test", "test"),
        (("train", "validation", "test"), {"train_split": "validation"}, "test", "test"),
        (("train",), {"holdout": 0.5}, "holdout", "holdout"),
    ],
)
def test_validation_chooses_and_test_is_reported(split, fields, chooses, reported, tmp_path):
    for name in split:
        for number in range(4):
            write(tmp_path / f"{name}/ant/{number}.png")
    data = DataConfig(f"folder:{tmp_path}", **fields)
    assert open_split(data, None).name == chooses
    assert open_reported(data).name == reported


def test_classes_are_in_natural_order_or_as_they_are_given(tmp_path):
    for number in range(1, 13):
        write(tmp_path / f"train/{number}/1.png")
    assert open_split(DataConfig(f"folder:{tmp_path}"), "train").class_names == tuple(map(str, range(1, 13)))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, range(12, 0, -1))))
    given = DataConfig(f"folder:{tmp_path}", class_names=str(names))
    assert open_split(given, "train").class_names[:2] == ("12", "11")
    names.write_text("1\n2\n")
    with pytest.raises(InputError, match=r"names.txt does not name the class folders 3, 4, 5, 6, 7 and 5 others"):
        open_split(given, "train")


@pytest.mark.parametrize(("training", "testing"), [("train", "valid"), ("Train", "Val"), ("training", "validation")])
def test_splits_have_the_names_that_people_give_them(training, testing, tmp_path, monkeypatch):
    write(tmp_path / training / "ant/1.png")
    write(tmp_path / testing / "ant/2.png")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert files_of(f"~/{tmp_path.name}") == ["ant:ant/1.png"]
    assert files_of(tmp_path, "test") == ["ant:ant/2.png"]


def test_an_unlabelled_test_beside_val_is_passed_over(tmp_path, caplog):
    for name in ("train/ant/1.png", "val/ant/2.png", "test/3.png"):
        write(tmp_path / name)
    assert files_of(tmp_path, "test") == ["ant:ant/2.png"]
    assert "has no labels" in caplog.text


@pytest.mark.parametrize(
    "labels",
    [
        b"great white\nant\nbee\n",
        b"\xef\xbb\xbfgreat white\r\nant\r\nbee\r\n",
        b"2\n0\n1\n",
        b"c 3.png\tbee\na.png\tgreat white\nb.png\tant\n",
        b"a.png great white\nb.png ant\nc 3.png bee\n",
        b"c 3.png,1\na.png,2\nb.png,0\n\n",
    ],
)
def test_labels_come_in_every_form(labels, tmp_path):
    for name in ("train/ant/1.png", "train/bee/1.png", "train/great white/1.png", "val/a.png", "val/b.png"):
        write(tmp_path / name)
    write(tmp_path / "val/c 3.png")
    (tmp_path / "val/labels.txt").write_bytes(labels)
    assert files_of(tmp_path, "test") == ["great white:a.png", "ant:b.png", "bee:c 3.png"]


def test_labels_in_latin_1_are_read_and_said(tmp_path, caplog):
    write(tmp_path / "train/Käfer/1.png")
    write(tmp_path / "val/a.png")
    (tmp_path / "val/labels.txt").write_bytes("Käfer\n".encode("latin-1"))
    assert files_of(tmp_path, "test") == ["Käfer:a.png"]
    assert "is not UTF-8, and is read as Latin-1" in caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("ant\n", "has 1 lines, and 2 images lie beside it"),
        ("a.png ant\n", "has no label of 1 images: b.png"),
        ("a.png ant\na.png ant\n", "line 2: a.png has a label already"),
        ("a.png ant\nz.png ant\n", "line 2: 'z.png ant' names no image that lies beside it"),
        ("a.png ant\nb.png wasp\n", "line 2: 'wasp' is none of the classes"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message, tmp_path):
    for name in ("train/ant/1.png", "val/a.png", "val/b.png"):
        write(tmp_path / name)
    (tmp_path / "val/labels.txt").write_text(labels)
    with pytest.raises(InputError, match=message):
        files_of(tmp_path, "test")


@pytest.mark.parametrize(("place", "joint"), [("mnist", "-"), ("mnist", "."), ("MNIST/raw", "-")])
def test_the_files_of_mnist_by_their_names(place, joint, tmp_path):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        (folder / f"{split}-images{joint}idx3-ubyte").write_bytes(struct.pack(">HBBIII", 0, 8, 3, 2, 2, 2) + bytes(8))
        (folder / f"{split}-labels{joint}idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 2) + bytes([0, 1]))
    data = DataConfig(f"idx:{tmp_path / place.removesuffix('/raw')}")
    assert open_split(data, "test").class_names == ("0", "1")
    (tmp_path / place).rename(tmp_path / "FashionMNIST")
    fashion = dataclasses.replace(data, source=f"idx:{tmp_path / 'FashionMNIST'}")
    assert open_split(fashion, "train").class_names[0] == "T-shirt/top"
