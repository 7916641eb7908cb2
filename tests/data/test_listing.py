"""Names of millions of files."""

import pickle
import random

import numpy as np
import pytest

from tnt_jax.data.listing import FileNames, image_names, labels_of


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


def test_links_that_lead_back_are_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").touch()
    (tmp_path / "a/back").symlink_to("..")
    (tmp_path / "l").symlink_to(".")
    assert image_names(tmp_path) == ["a/1.jpg"]
    assert image_names(tmp_path / "a") == ["1.jpg"]


def test_labels_are_as_small_as_they_can_be():
    assert labels_of([1, 2], [0, 255]).dtype == np.uint8
    assert labels_of([1, 2], [0, 256]).tolist() == [0, 256, 256]
    assert labels_of([], []).tolist() == []
