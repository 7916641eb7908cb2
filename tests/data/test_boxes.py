"""Sources of boxes, what is wrong with them, and boxes that move with their image."""

import csv
import dataclasses
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.augment import augment
from tnt_jax.data.moving import Places, fitted
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import eval_batches, train_batches
from tnt_jax.tasks.detection import in_pixels
from tnt_jax.tasks.table import TASKS

SIZES = [(40, 30), (32, 32), (50, 20), (24, 48)]  # width, height
BOXES = [[("cat", 4, 6, 20, 26), ("dog", 0, 0, 10, 10)], [("dog", 1, 2, 31, 30)], [], [("cat", 3, 5, 9, 47)]]


@pytest.fixture
def images(tmp_path):
    for index, size in enumerate(SIZES):
        Image.new("RGB", size, (index, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def coco():
    """Numbers of categories and images have gaps, and stand in no order."""
    numbers, number = {"dog": 90, "cat": 7}, iter(range(100, 200))
    return {
        "images": [
            {"id": 50 - index, "file_name": f"{index}.png", "width": width, "height": height}
            for index, (width, height) in enumerate(SIZES)
        ],
        "annotations": [
            {"id": next(number), "image_id": 50 - index, "category_id": numbers[name], "iscrowd": 0, "area": 7.5}
            | {"bbox": [left, top, right - left, bottom - top]}
            for index, boxes in enumerate(BOXES)
            for name, left, top, right, bottom in boxes
        ],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }


def write_coco(folder, content):
    (folder / "boxes.json").write_text(json.dumps(content))
    return f"coco:{folder / 'boxes.json'}"


def write_voc(folder):
    (folder / "Annotations").mkdir()
    for index, (boxes, (width, height)) in enumerate(zip(BOXES, SIZES, strict=True)):
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
            f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
            for name, left, top, right, bottom in boxes
        )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{index}.png</filename>{size}{objects}</annotation>"
        (folder / f"Annotations/{index}.xml").write_text(text)
    return f"voc:{folder}"


def write_table(folder):
    with (folder / "boxes.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image_path", "xmin", "ymin", "xmax", "ymax", "label"])
        for index, boxes in enumerate(BOXES):
            lines.writerows([f"{index}.png", *box, name] for name, *box in boxes)
            if not boxes:
                lines.writerow([f"{index}.png", "", "", "", "", ""])
    return f"boxes:{folder / 'boxes.csv'}"


WRITERS = {"coco": lambda folder: write_coco(folder, coco()), "voc": write_voc, "boxes": write_table}


def data_of(source, **changes):
    return DataConfig.plain(source, task="detection", label_smoothing=0.0, **changes)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_source_tells_the_same_boxes(kind, images):
    split = open_split(data_of(WRITERS[kind](images)), "train")
    assert (split.class_names, len(split)) == (("cat", "dog"), 4)
    of_copy = pickle.loads(pickle.dumps(split))  # as workers have it
    for index, boxes in enumerate(BOXES):
        pixels, found = split[index]
        assert pixels.shape[1::-1] == SIZES[index]
        expected = [[*box, split.class_names.index(name), 0] for name, *box in boxes]
        np.testing.assert_array_equal(found[:, :6], np.array(expected, np.float32).reshape(-1, 6))
        areas = [7.5 if kind == "coco" else (box[3] - box[1]) * (box[4] - box[2]) for box in boxes]
        np.testing.assert_array_equal(found[:, 6], np.array(areas, np.float32))
        np.testing.assert_array_equal(of_copy[index][1], found)
    part = split.images.take(np.array([3, 0]))
    assert [len(part.labelled(index)[1]) for index in range(2)] == [1, 2]


def test_a_part_is_held_out_and_a_digest_says_what_changed(images):
    data = data_of(write_coco(images, coco()), holdout=0.25)
    train, held = open_split(data, "train"), open_split(data, None)
    assert (len(train), len(held)) == (3, 1)
    before = open_split(data_of(data.source), "train").images.digest()
    content = coco()
    content["annotations"][0]["bbox"][0] += 1
    write_coco(images, content)
    assert open_split(data_of(data.source), "train").images.digest() != before


def test_a_folder_of_cocos_has_its_splits(images):
    (images / "annotations").mkdir()
    (images / "val2017").mkdir()
    content = coco()
    (images / "annotations/instances_train2017.json").write_text(json.dumps(content))
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:2]
    (images / "0.png").rename(images / "val2017/0.png")
    (images / "annotations/instances_val2017.json").write_text(json.dumps(content))
    content = coco()
    content["images"] = content["images"][1:]
    content["annotations"] = content["annotations"][2:]
    (images / "annotations/instances_train2017.json").write_text(json.dumps(content))
    data = data_of(f"coco:{images}")
    assert (len(open_split(data, "train")), len(open_split(data, None))) == (3, 1)


def broken(change):
    content = coco()
    change(content)
    return content


def set_at(kind, index, name, value):
    def change(content):
        content[kind][index][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "is no COCO: it has no list images"),
        (
            set_at("annotations", 1, "bbox", [1, 2, 3]),
            r"annotations\[1\] has bbox \[1, 2, 3\], which should be four numbers",
        ),
        (set_at("annotations", 1, "bbox", [1, 2, "3", 4]), r"annotations\[1\] has bbox .*four numbers"),
        (set_at("annotations", 2, "image_id", 3), r"annotations\[2\] has image_id 3, which no entry has"),
        (set_at("annotations", 2, "category_id", 8), r"annotations\[2\] has category_id 8, which no entry has"),
        (
            set_at("annotations", 0, "bbox", [4, 6, -3, 4]),
            r"annotations\[0\] of 0.png has the box 4, 6, 1, 10; left, top, ",
        ),
        (set_at("images", 1, "id", 50), r"images\[1\] has the id 50, as one before it"),
        (set_at("images", 1, "file_name", None), r"images\[1\] has file_name null, which should be a text"),
        (set_at("categories", 1, "id", "7"), r'categories\[1\] has id "7", which should be a whole number'),
        (set_at("categories", 1, "name", "dog"), "2 categories, and some of one number or one name"),
        (set_at("images", 0, "file_name", "none.png"), "the image none.png is in none of"),
        (lambda content: content["images"].clear(), "has no image"),
    ],
)
def test_what_is_no_coco_is_said_with_its_place(change, message, images):
    with pytest.raises(InputError, match=message):
        open_split(data_of(write_coco(images, broken(change))), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("images", 0, "width", 41), r"0.png is 40 x 30 pixels, and its boxes are said to be of 41 x 30"),
        (
            set_at("annotations", 0, "bbox", [30, 6, 20, 4]),
            r"0.png is 40 x 30 pixels, and has a box from 30, 6, 50, 10",
        ),
        (set_at("annotations", 0, "bbox", [-3, 6, 20, 4]), r"has a box from -3, 6, 17, 10"),
    ],
)
def test_boxes_of_another_image_are_said_when_it_is_read(change, message, images):
    split = open_split(data_of(write_coco(images, broken(change))), "train")
    with pytest.raises(InputError, match=message):
        split[0]


def test_a_box_without_area_is_left_out_and_said(images, caplog):
    content = broken(set_at("annotations", 1, "bbox", [5, 5, 0, 4]))
    split = open_split(data_of(write_coco(images, content)), "train")
    assert len(split[0][1]) == 1
    assert "1 boxes without an area are left out, first annotations[1] of 0.png" in caplog.text


def test_what_is_no_json_no_xml_and_no_table_is_said(images):
    (images / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad.json is no JSON"):
        open_split(data_of(f"coco:{images / 'bad.json'}"), "train")
    source = write_voc(images)
    (images / "Annotations/1.xml").write_text("<annotation><filename>1.png</filename><object></object></annotation>")
    with pytest.raises(InputError, match=r"1.xml is no annotation of Pascal VOC: object 0 has no <bndbox>"):
        open_split(data_of(source), "train")
    (images / "bad.csv").write_text("image,xmin,ymin,xmax,ymax,label\n0.png,1,2,x,4,cat\n")
    with pytest.raises(InputError, match=r"bad.csv, line 2: the box is 1, 2, x, 4, and should be four numbers"):
        open_split(data_of(f"boxes:{images / 'bad.csv'}"), "train")
    (images / "bad.csv").write_text("image,xmin,ymin,xmax,label\n0.png,1,2,3,cat\n")
    with pytest.raises(InputError, match=r"bad.csv has no column ymax; boxes need xmin, ymin, xmax, ymax"):
        open_split(data_of(f"boxes:{images / 'bad.csv'}"), "train")


def test_a_source_of_another_kind_is_refused_with_what_fits(images):
    with pytest.raises(InputError, match=r"has labels of images, and data.task is detection.*coco:PATH"):
        open_split(data_of("digits"), "train")
    with pytest.raises(InputError, match=r"has boxes of images, and .* take data.task detection"):
        open_split(dataclasses.replace(data_of(write_coco(images, coco())), task="segmentation"), "train")


def drawn(box, size):
    """An image with a white box."""
    image = np.zeros((*size, 1), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    return image


CHANGES = [
    {"crop_area": (0.3, 1.0), "random_flip": 0.5},
    {"scale_jitter": (0.3, 2.0), "random_flip": 0.5},
    {"random_shift": 0.3, "random_flip": 1.0},
    {"simple_crop": True, "random_flip": 0.5},
    {},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_box_lies_where_its_pixels_lie_after_whatever_moves_them(changes):
    rng = np.random.default_rng(0)
    data, task = data_of("digits", interpolation="bilinear", **changes), TASKS["detection"]
    for seed in range(60):
        left, top = rng.integers(0, 60, 2)
        box = (left, top, *(np.array([left, top]) + rng.integers(12, 60, 2)).clip(None, [90, 120]))
        pixels, places = augment(drawn(box, (120, 90)), data, (64, 64), np.random.default_rng(seed))
        label = task.moved(np.array([[*box, 3, 0, 1]], np.float32), places)
        inside = pixels[..., 0] > 191  # padding is grey
        # What comes in from the edge shows the box again.
        found = label[1, :4] * 64 if label[1, 4] >= 0 else np.zeros(4)
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        if {"random_shift", "simple_crop"} & changes.keys() and (found.min() <= 8 or found.max() >= 56):
            continue
        if len(rows) < 2 or len(columns) < 2:
            assert ((found[2:] - found[:2]) < 3).any()
            continue
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(found, seen, atol=1.6)


def test_an_evaluated_box_is_found_again_in_the_pixels_of_the_whole_image():
    box = np.array([[10, 20, 30, 60, 2, 0, 5.0]], np.float32)
    for shape in ((100, 50), (37, 90), (64, 64)):
        _, places = fitted(np.zeros((*shape, 1), np.uint8), (64, 64), Image.Resampling.BILINEAR, (0,))
        inside = box.copy()
        inside[:, :4] = inside[:, :4].clip(0, [shape[1], shape[0]] * 2)
        again = in_pixels(TASKS["detection"].moved(inside, places))
        np.testing.assert_allclose(again, inside, atol=1e-3)


def test_crowds_come_last_and_too_many_boxes_are_refused():
    places = Places.of_box((0, 0, 64, 64), (64, 64))
    boxes = np.array([[0, 0, 9, 9, 1, 1, 3], [1, 1, 8, 8, 2, 0, 4]], np.float32)
    label = TASKS["detection"].moved(boxes, places)
    assert label[1:4, 4].tolist() == [2, 1, -1]
    with pytest.raises(InputError, match="has 101 boxes, and at most 100"):
        TASKS["detection"].moved(boxes[:1].repeat(101, 0), places)


def test_batches_are_the_same_whoever_prepares_them(images):
    data = data_of(write_coco(images, coco()), crop_area=(0.3, 1.0), random_flip=0.5)
    split = open_split(data, "train")
    given = {"image_size": (32, 32), "channels": 3, "batch_size": 2, "seed": 1}
    found = []
    for workers in (0, 2):
        batches = train_batches(split, dataclasses.replace(data, num_workers=workers), **given)
        found.append([next(batches) for _ in range(3)])
        batches.close()
    for one, other in zip(*found, strict=True):
        assert one["label"].shape == (2, 101, 7)
        for name in ("image", "label"):
            np.testing.assert_array_equal(one[name], other[name])
    whole = next(eval_batches(split, data, image_size=(32, 32), channels=3, batch_size=4))
    assert [(label[1:, 4] >= 0).sum() for label in whole["label"]] == [2, 1, 0, 1]
