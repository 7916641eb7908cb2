"""Masks beside images, in folders, tables and records: what they mean, and what is wrong with them."""

import contextlib
import csv
import dataclasses
import io
import logging
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.check import content_of
from tnt_jax.data.opening import open_reported, open_split
from tnt_jax.data.pipeline import eval_batches, train_batches
from tnt_jax.tasks.segmentation import IGNORED

COUNT = 6
SIZES = {"image_size": (16, 24), "channels": 3, "batch_size": 4}


def mask_of(index, height=20, width=30):
    """A number in three places, and ignored at the first pixel."""
    mask = np.zeros((height, width), np.uint8)
    mask[: 5 + index] = 1
    mask[:, 10 + index :] = 2
    mask[0, 0] = 255
    return mask


def write(folder, indices=range(COUNT), images="images", masks="masks"):
    for kind in (images, masks):
        (folder / kind).mkdir(parents=True)
    for index in indices:
        mask = mask_of(index)
        Image.fromarray(np.repeat(mask[..., None] * 60, 3, 2)).save(folder / images / f"photo{index}.jpg", quality=95)
        Image.fromarray(mask).save(folder / masks / f"photo{index}.png")
    return folder


@pytest.fixture
def scenes(tmp_path):
    write(tmp_path / "data")
    (tmp_path / "data" / "classes.txt").write_text("sky\ngrass\ndog\n")
    return tmp_path / "data"


def data_of(folder, **changes):
    return DataConfig.plain(f"masks:{folder}", task="segmentation", label_smoothing=0.0, **changes)


def test_images_and_masks_belong_together_by_their_names(scenes):
    source = open_split(data_of(scenes), "train")
    assert (len(source), source.class_names, source.name) == (COUNT, ("sky", "grass", "dog"), "train")
    for index in range(COUNT):
        pixels, mask = source[index]
        wanted = mask_of(index).astype(np.uint16)
        np.testing.assert_array_equal(mask, np.where(wanted == 255, IGNORED, wanted))
        assert pixels.shape == (20, 30, 3)
        assert source.image_name(index).endswith(f"photo{index}.jpg")
    again = pickle.loads(pickle.dumps(source.take(np.array([3, 1]))))
    np.testing.assert_array_equal(again[0][1], source[3][1])


@pytest.mark.parametrize(
    ("images", "masks"),
    [("{}/images", "{}/masks"), ("images/{}", "masks/{}"), ("images/{}", "annotations/{}"), ("{}/images", "{}/labels")],
)
def test_splits_are_folders_around_or_inside(tmp_path, images, masks):
    for split, indices in {"training": [0, 1, 2], "validation": [3], "test": [4, 5]}.items():
        write(tmp_path, indices, images.format(split), masks.format(split))
    data = data_of(tmp_path)
    assert [len(open_split(data, split)) for split in ("train", None, "test")] == [3, 1, 2]
    assert len(open_reported(data)) == 2
    assert open_split(data, "test").class_names == ("0", "1", "2")
    with pytest.raises(InputError, match=r"there is no split 'odd'; there are 'train', 'validation', 'test'"):
        open_split(data, "odd")


def test_without_splits_a_part_is_held_out(scenes):
    with pytest.raises(InputError, match=r"--data\.holdout 0\.2"):
        open_split(data_of(scenes), None)
    data = data_of(scenes, holdout=0.34)
    train, test = open_split(data, "train"), open_split(data, None)
    names = {split.image_name(index) for split in (train, test) for index in range(len(split))}
    assert (len(train), len(test), len(names)) == (4, 2, COUNT)
    train, test = (open_split(data_of(scenes, fold="1/3"), split) for split in ("train", None))
    assert (len(train), len(test)) == (4, 2)


@pytest.mark.parametrize("kind", ["palette", "16 bits", "rgb", "npy", "bits", "tiff"])
def test_masks_of_every_kind_have_the_same_values(tmp_path, kind):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    mask = mask_of(0) if kind != "bits" else (mask_of(0) == 1).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "images/a.png")
    place = tmp_path / "masks/a.png"
    if kind == "palette":
        picture = Image.fromarray(mask, "P")
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        picture.save(place)
    elif kind == "16 bits":
        Image.fromarray(mask.astype(np.uint16)).save(place)
    elif kind == "rgb":
        Image.fromarray(np.repeat(mask[..., None], 3, 2)).save(place)
    elif kind == "npy":
        np.save(tmp_path / "masks/a.npy", mask.astype(np.int64))
    elif kind == "bits":
        Image.fromarray(mask.astype(bool)).save(place)
    else:
        Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "masks/a.tif")
    source = open_split(data_of(tmp_path), "train")
    np.testing.assert_array_equal(source[0][1], np.where(mask == 255, IGNORED, mask.astype(np.uint16)))
    assert len(source.class_names) == (2 if kind == "bits" else 3)


def test_of_many_classes_255_is_one_of_them(tmp_path):
    mask = np.arange(400, dtype=np.uint16).reshape(20, 20)
    mask[19, 19] = 65535
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.fromarray(mask).save(tmp_path / kind / "a.png")
    source = open_split(data_of(tmp_path), "train")
    assert len(source.class_names) == 399
    np.testing.assert_array_equal(source[0][1], mask)


def test_values_that_are_no_class_may_be_named(scenes):
    """As ADE20K, whose 0 is not labelled: the classes begin with 1."""
    (scenes / "classes.txt").write_text("grass\ndog\n")
    source = open_split(data_of(scenes, ignore=(0,)), "train")
    wanted = mask_of(2).astype(np.int64) - 1
    np.testing.assert_array_equal(source[2][1], np.where((wanted < 0) | (wanted > 2), IGNORED, wanted))
    (scenes / "classes.txt").unlink()
    assert open_split(data_of(scenes, ignore=(0,)), "train").class_names == ("0", "1")
    with pytest.raises(InputError, match="all of their pixels are ignored"):
        open_split(data_of(scenes, ignore=(0, 1, 2)), "train")


def test_batches_have_the_masks_of_their_images_whoever_prepares_them(scenes):
    """What is dark is class 0, what is brighter another: also after a crop, a shift and a flip."""
    data = data_of(scenes, crop_area=(0.3, 1.0), random_shift=0.2, random_flip=0.5)
    source = open_split(data, "train")
    made = {}
    for workers, start in ((0, 0), (2, 0), (0, 3)):
        batches = train_batches(
            source, dataclasses.replace(data, num_workers=workers), **SIZES, seed=5, start_step=start, dtype="uint8"
        )
        made[workers, start] = [next(batches) for _ in range(4)]
        batches.close()
    for first, second in ((made[0, 0], made[2, 0]), (made[0, 0][3:], made[0, 3][:1])):
        for ours, theirs in zip(first, second, strict=True):
            np.testing.assert_array_equal(ours["image"], theirs["image"])
            np.testing.assert_array_equal(ours["label"], theirs["label"])
    for batch in made[0, 0]:
        assert (batch["label"].dtype, batch["label"].shape) == (np.uint16, (4, 16, 24))
        known = batch["label"] != IGNORED
        grey = np.round(batch["image"].mean(-1) / 60)
        assert (grey == batch["label"])[known].mean() > 0.85
    batches = list(eval_batches(source, data, **SIZES))
    assert [batch["mask"].sum() for batch in batches] == [4, 2]
    np.testing.assert_array_equal(batches[0]["label"][0][:, 0], [IGNORED, *[1] * 3, *[0] * 12])


def test_a_table_names_images_and_masks(scenes, tmp_path):
    rows = [
        {"image": f"data/images/photo{i}.jpg", "mask": f"data/masks/photo{i}.png", "split": ("train", "val")[i > 3]}
        for i in range(COUNT)
    ]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    data = dataclasses.replace(data_of(scenes), source=f"csv:{tmp_path / 'table.csv'}")
    train, val = open_split(data, "train"), open_split(data, None)
    assert (len(train), len(val), train.class_names) == (4, 2, ("0", "1", "2"))
    np.testing.assert_array_equal(val[1][1], open_split(data_of(scenes), "train")[5][1])
    named = dataclasses.replace(data, class_names=str(scenes / "classes.txt"))
    assert open_split(named, "train").class_names == ("sky", "grass", "dog")
    with pytest.raises(InputError, match="one column has masks, and mask and other were named"):
        open_split(dataclasses.replace(data, label_columns=("mask", "other")), "train")
    (scenes / "masks/photo4.png").unlink()
    with pytest.raises(InputError, match=r"table\.csv, line 6: 1 of 6 masks are not there"):
        open_split(data, "train")
    (tmp_path / "other.csv").write_text("image,kind\ndata/images/photo0.jpg,a\n")
    with pytest.raises(InputError, match=r"has no column 'mask' or 'masks' or 'mask_path'; it has 'image', 'kind'"):
        open_split(dataclasses.replace(data, source=f"csv:{tmp_path / 'other.csv'}"), "train")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


class Pets(tfds.core.GeneratorBasedBuilder):
    """As oxford_iiit_pet is: an image and a segmentation mask from 1 to 3."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1), dtype=np.uint8),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(range(4)), "test": self._generate_examples(range(4, 6))}

    def _generate_examples(self, indices):
        for index in indices:
            mask = mask_of(index).clip(0, 2) + 1
            image = np.repeat(mask[..., None] * 60, 3, 2).astype(np.uint8)
            yield index, {"image": png(image), "segmentation_mask": png(mask.astype(np.uint8))}


def test_tfds_has_masks_beside_its_images(tmp_path):
    builder = Pets(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    data = dataclasses.replace(data_of(""), source=f"array_record:{builder.data_dir}", ignore=(0,))
    train, test = open_split(data, "train"), open_split(data, None)
    assert (len(train), len(test), train.class_names) == (4, 2, ("0", "1", "2"))
    read = [mask for _, mask in (train[index] for index in range(4))]
    assert sorted(map(np.ndarray.tobytes, read)) == sorted(
        mask_of(i).clip(0, 2).astype(np.uint16).tobytes() for i in range(4)
    )
    assert train.images.digest() != test.images.digest()
    classes = dataclasses.replace(data, task="single_label", ignore=())
    with pytest.raises(InputError, match="and an image and a label are needed"):
        open_split(classes, "train")


def broken(folder, name):
    """What is done to the folder of scenes, and what is said of it."""
    mask, image = folder / "masks/photo1.png", folder / "images/photo1.jpg"
    if name == "another size":
        Image.fromarray(mask_of(1, 21, 30)).save(mask)
    elif name == "a value":
        values = mask_of(1)
        values[7, 4] = 9
        Image.fromarray(values).save(mask)
    elif name == "no mask":
        mask.unlink()
    elif name == "damaged":
        mask.write_bytes(mask.read_bytes()[:60])
    elif name == "nonsense":
        mask.write_text('{"images": [], "annotations": []}')
    elif name == "colours":
        Image.fromarray(np.random.default_rng(0).integers(0, 9, (20, 30, 3), np.uint8)).save(mask)
    elif name == "jpeg":
        mask.unlink()
        Image.fromarray(mask_of(1)).save(mask.with_suffix(".jpg"))
    elif name == "two masks":
        Image.fromarray(mask_of(1)).save(mask.with_suffix(".tif"))
    elif name == "no images":
        for each in (folder / "images").iterdir():
            each.unlink()
    elif name == "an image":
        image.write_bytes(b"\xff\xd8\xff")


SAID = {
    "another size": r"photo1\.jpg is 30 x 20 pixels, and its mask 30 x 21; both must be of one size",
    "a value": r"photo1\.png has the value 9 in row 7, column 4; the 3 classes are 0 to 2, and ignored is 255 or 65535",
    "no mask": r"1 of 6 images in .* have no mask in .*masks, first photo1\.jpg: photo1\.png should lie there",
    "damaged": r"photo1\.png cannot be read as a mask: ",
    "nonsense": r"photo1\.png cannot be read as a mask: it is not in a format that Pillow knows",
    "colours": r"photo1\.png cannot be read as a mask: it is uint8 \(20, 30, 3\), and should have one channel",
    "jpeg": r"photo1\.jpg cannot be read as a mask: it is JPEG, which changes the numbers of classes; PNG keeps them",
    "two masks": r"masks has two masks of one image: photo1\.png and photo1\.tif",
    "no images": r"images holds no image",
    "an image": r"photo1\.jpg cannot be read as an image",
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_wrong_is_said_with_the_file(scenes, name):
    broken(scenes, name)

    def read():
        source = open_split(data_of(scenes), "train")
        with contextlib.closing(train_batches(source, data_of(scenes), **SIZES, seed=0, dtype="uint8")) as batches:
            for _ in range(2):
                next(batches)

    with pytest.raises(InputError, match=SAID[name]):
        read()


def test_a_broken_test_mask_does_not_make_another_split_the_reported_one(tmp_path):
    for split, indices in {"train": [0, 1, 2], "val": [3], "test": [4, 5]}.items():
        write(tmp_path / split, indices)
    (tmp_path / "test/masks/photo4.png").write_bytes(b"nothing")
    assert open_reported(data_of(tmp_path)).name == "test"


def test_a_mask_that_is_too_many_is_said_and_left_out(scenes, caplog):
    (scenes / "images/photo2.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(open_split(data_of(scenes), "train")) == COUNT - 1
    assert "has 1 masks without an image, left out, first photo2.png" in caplog.text


def test_an_unreadable_mask_may_be_skipped_as_an_image_may(scenes, caplog):
    broken(scenes, "a value")
    data = data_of(scenes, skip_unreadable=0.2)
    batches = train_batches(open_split(data, "train"), data, **SIZES, seed=0, dtype="uint8")
    for _ in range(3):
        next(batches)
    batches.close()
    assert "skipped unreadable image 1 of at most 1" in caplog.text


def test_masks_and_tasks_must_fit(scenes):
    message = "has masks of images, and data.task is single_label, which needs one class of each image: take data.t"
    with pytest.raises(InputError, match=message):
        open_split(DataConfig.plain(f"masks:{scenes}"), "train")
    message = "digits has labels of images, and data.task is segmentation, which needs a mask of .*, or masks:PATH"
    with pytest.raises(InputError, match=message):
        open_split(DataConfig.plain("digits", task="segmentation"), "train")
    with pytest.raises(InputError, match="there is no folder"):
        open_split(data_of(scenes / "nowhere"), "train")


def test_a_run_knows_its_files_and_what_is_ignored(scenes):
    known = [content_of(open_split(data_of(scenes, ignore=ignore), "train"))["records"] for ignore in ((), (1,), ())]
    assert known[0] == known[2] != known[1]
    (scenes / "masks/photo1.png").rename(scenes / "masks/photo1.tif")
    assert content_of(open_split(data_of(scenes), "train"))["records"] != known[0]
