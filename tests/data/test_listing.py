"""Names of millions of files."""

import os
import pickle
import random

import numpy as np
import pytest

from tnt_jax.config import InputError
from tnt_jax.data.listing import FileNames, images_below, labels_of


def test_names_are_those_that_were_given():
    given = [("", ["flat.jpg", "deep/er.jpg"]), ("n01", []), ("n02", ["a.jpg", "b.JPEG"]), ("é", ["ü \udcff.png"])]
    names = FileNames(given)
    expected = ["flat.jpg", "deep/er.jpg", "n02/a.jpg", "n02/b.JPEG", "é/ü \udcff.png"]
    assert list(names) == expected
    assert [names[index - len(names)] for index in range(len(names))] == expected
    assert list(pickle.loads(pickle.dumps(names))) == expected
    for outside in (5, -6):
        with pytest.raises(IndexError):
            names[outside]


def test_no_names():
    assert list(FileNames([])) == list(FileNames([("a", [])])) == []


def test_a_file_of_imagenet_21k_takes_less_than_30_bytes():
    random_ = random.Random(0)
    classes = [(f"n{number:08d}", [f"n{number:08d}_{random_.randrange(40_000)}.JPEG" for _ in range(650)])
               for number in range(200)]  # fmt: skip
    names = FileNames(classes)
    labels = labels_of([650] * 200, range(21_841 - 200, 21_841))
    assert (names.nbytes + labels.nbytes) / len(names) < 30
    assert labels[649] == 21_641
    assert labels[650] == 21_642


def test_a_folder_is_listed_deeply_and_in_natural_order(tmp_path):
    for name in ("b10.jpg", "b2.JPG", "a/c.png", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(path, tmp_path) for path in images_below(tmp_path)] == ["a/c.png", "b2.JPG", "b10.jpg"]
    first = next(images_below(tmp_path))
    (tmp_path / "b1.jpg").touch()
    assert next(images_below(tmp_path)) == first == str(tmp_path / "a/c.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"there is no image in .*none"):
        list(images_below(tmp_path / "none"))
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        list(images_below(tmp_path / "nowhere"))


def test_links_that_lead_back_are_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").touch()
    (tmp_path / "a/back").symlink_to("..")
    (tmp_path / "a/here").symlink_to(".")
    (tmp_path / "again").symlink_to("a")
    assert [os.path.relpath(path, tmp_path) for path in images_below(tmp_path)] == ["a/1.jpg"]


def test_labels_are_as_small_as_they_can_be():
    assert labels_of([1, 2], [0, 255]).dtype == np.uint8
    assert labels_of([1, 2], [0, 256]).tolist() == [0, 256, 256]
    assert labels_of([], []).tolist() == []
