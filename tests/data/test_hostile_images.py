"""What image files can be: each is read right, or refused with its name and the reason, as in training."""

import dataclasses
import io
import itertools
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.decode import read_image
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import eval_batches, train_batches
from tnt_jax.data.samples import to_channels, to_depth

QUARTERS = np.zeros((32, 48, 3), np.uint8)
QUARTERS[:16, :24, 0] = QUARTERS[:16, 24:, 1] = QUARTERS[16:, :24, 2] = 255
QUARTERS[16:, 24:] = 255
PICTURE = Image.fromarray(QUARTERS)
GREY = np.asarray(PICTURE.convert("L"))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    """A JPEG whose pixels lie turned by one of Pillow's transpositions, and whose EXIF orientation says so."""
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = PICTURE if undo is None else PICTURE.transpose(undo)
    return encoded(image, "JPEG", quality=95, subsampling=0, exif=exif)


def png_of(width, height):
    """A PNG of a few bytes that claims to be that large."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of(width, height):
    content = bytearray(JPEG)
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


JPEG = encoded(PICTURE, "JPEG", quality=95, subsampling=0)
ALPHA = np.dstack([QUARTERS, np.arange(32 * 48).reshape(32, 48).astype(np.uint8)])
READ = {  # file name and content to the pixels it should give, None for QUARTERS
    "plain.jpg": (JPEG, None),
    "jpeg_by_another_name.png": (JPEG, None),
    "progressive.jpg": (encoded(PICTURE, "JPEG", quality=95, subsampling=0, progressive=True), None),
    "cmyk.jpg": (encoded(PICTURE.convert("CMYK"), "JPEG", quality=95, subsampling=0), None),
    "grey.jpg": (encoded(PICTURE.convert("L"), "JPEG", quality=95), GREY),
    "grey.png": (encoded(PICTURE.convert("L"), "PNG"), GREY),
    "black_and_white.png": (encoded(PICTURE.convert("1", dither=0), "PNG"), np.where(GREY > 127, 255, 0)),
    "sixteen_bits.png": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), GREY),
    "sixteen_bits.tiff": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), GREY),
    "palette.png": (encoded(PICTURE.quantize(4), "PNG"), None),
    "palette.gif": (encoded(PICTURE.quantize(4), "GIF"), None),
    "alpha.png": (encoded(Image.fromarray(ALPHA), "PNG"), None),
    "grey_and_alpha.png": (encoded(Image.fromarray(ALPHA).convert("LA"), "PNG"), GREY),
    "lossless.webp": (encoded(PICTURE, "WEBP", lossless=True), None),
    "bitmap.bmp": (encoded(PICTURE, "BMP"), None),
    "one_pixel.png": (encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), np.full((1, 1, 3), (9, 8, 7))),
    "one_row.jpg": (
        encoded(Image.new("RGB", (300, 1), (9, 8, 7)), "JPEG", quality=95),
        np.full((1, 300, 3), (9, 8, 7)),
    ),
    "damaged_exif.jpg": (JPEG[:2] + b"\xff\xe1\x00\x0aExif\0\0\xff\xff" + JPEG[2:], None),
    **{f"orientation_{number}.jpg": (turned(number), None) for number in range(1, 9)},
}
REFUSED = {  # file name and content to the reason
    "empty.jpg": (b"", "it is empty"),
    "truncated.jpg": (JPEG[:-40], "truncated"),
    "truncated_in_the_header.jpg": (JPEG[: len(JPEG) // 2], "Truncated"),
    "only_the_beginning.jpg": (JPEG[:20], "not in a format that Pillow knows|truncated"),
    "truncated.png": (encoded(PICTURE, "PNG")[:60], "truncated|not in a format"),
    "text.jpg": (b"this is no image", "not in a format that Pillow knows"),
    "page.png": (b"<html>404 not found</html>", "not in a format that Pillow knows"),
    "bomb.png": (png_of(60_000, 60_000), "decompression bomb"),
    "bomb.jpg": (jpeg_of(60_000, 60_000), "decompression bomb"),
    "large.png": (png_of(20_000, 20_000), "20000 x 20000 pixels: could be a decompression bomb"),
    "large.gif": (
        b"GIF89a" + struct.pack("<HH", 20_000, 20_000) + encoded(PICTURE.quantize(4), "GIF")[10:],
        "20000 x 20000 pixels: could be a decompression bomb",
    ),
}


def folder_of(path, files):
    for split in ("train", "val"):
        for name, content in files.items():
            target = path / split / "class" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return f"folder:{path}"


@pytest.mark.parametrize("name", READ)
def test_images_of_every_kind_are_read(name, tmp_path):
    content, expected = READ[name]
    image, _ = open_split(DataConfig(folder_of(tmp_path, {name: content})), "train").read(0, 3)
    image = to_channels(image, 3)
    expected = QUARTERS if expected is None else np.asarray(expected)
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    assert image.shape == expected.shape
    assert image.dtype == (np.uint16 if name.startswith("sixteen") else np.uint8)
    # JPEG is lossy at the borders of the quarters
    assert np.mean(np.abs(to_depth(image, "uint8").astype(int) - expected)) < 4


@pytest.mark.parametrize("name", READ)
def test_images_of_every_kind_are_trained_on(name, tmp_path):
    source = open_split(DataConfig(folder_of(tmp_path, {name: READ[name][0]})), "train")
    data = dataclasses.replace(DataConfig(), repeats=1)
    batches = train_batches(source, data, image_size=(32, 32), channels=3, batch_size=1, seed=0)
    for batch in itertools.islice(batches, 5):
        assert batch["image"].shape == (1, 32, 32, 3)
    batches.close()


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in REFUSED), *((name, 1) for name in list(REFUSED)[:2])]
)
def test_what_cannot_be_read_is_named_with_the_reason(name, workers, tmp_path):
    content, reason = REFUSED[name]
    spec = folder_of(tmp_path, {name: content})
    data = dataclasses.replace(DataConfig(), repeats=1, num_workers=workers, depth="uint8")
    feed = {"image_size": (32, 32), "channels": 3, "batch_size": 1}
    for batches in (
        train_batches(open_split(DataConfig(spec), "train"), data, **feed, seed=0),
        eval_batches(open_split(DataConfig(spec), "test"), dataclasses.replace(data, skip_unreadable=1.0), **feed),
    ):
        with pytest.raises(InputError, match=f"{tmp_path}/.*{name} cannot be read as an image: .*({reason})"):
            next(batches)


def test_a_photograph_above_pillows_own_limit_is_upright(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    read = read_image(turned(6), 3).astype(int)
    assert read.shape == QUARTERS.shape
    assert np.abs(read - QUARTERS).mean() < 3


def test_a_file_without_permission_or_that_is_gone_is_named(tmp_path, monkeypatch):
    source = open_split(DataConfig(folder_of(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG})), "train")
    (tmp_path / "train/class/a.jpg").unlink()
    with pytest.raises(InputError, match=r"there is no image .*train/class/a.jpg"):
        source[0]

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, whom no mode keeps out
    with pytest.raises(InputError, match=r"train/class/b.jpg cannot be read as an image: Permission denied"):
        source[1]


def some_damaged(path, damaged, count=32):
    files = {f"{index:03}.jpg": READ["plain.jpg"][0] for index in range(count)}
    return folder_of(path, files | {f"{index:03}.jpg": b"" for index in damaged})


def read(spec, **changes):
    data = dataclasses.replace(DataConfig(), repeats=1, **changes)
    batches = train_batches(
        open_split(DataConfig(spec), "train"), data, image_size=(16, 16), channels=3, batch_size=8, seed=0
    )
    try:
        return [batch["image"].tobytes() for batch in itertools.islice(batches, 8)]
    finally:
        batches.close()


def test_training_skips_as_many_images_as_allowed_and_stays_the_same(tmp_path, caplog):
    spec = some_damaged(tmp_path, (3, 17))
    reference = read(spec, skip_unreadable=2 / 32)
    assert len([line for line in caplog.messages if "skipped unreadable image" in line]) == 2
    assert "003.jpg cannot be read as an image: it is empty" in caplog.text
    for workers in (1, 3):
        assert read(spec, skip_unreadable=2 / 32, num_workers=workers) == reference


@pytest.mark.parametrize("workers", [0, 2])
def test_training_ends_when_more_images_are_unreadable_than_allowed(tmp_path, workers):
    spec = some_damaged(tmp_path, (3, 17, 20))
    message = (
        r"3 of 32 training images are unreadable, and data.skip_unreadable 0.0625 allows 2; the last: .*it is empty"
    )
    with pytest.raises(InputError, match=message):
        read(spec, skip_unreadable=2 / 32, num_workers=workers)


def test_a_source_of_nothing_but_damaged_images_ends_too(tmp_path):
    with pytest.raises(InputError, match="it is empty"):
        read(some_damaged(tmp_path, range(32)), skip_unreadable=0.5)


def test_by_default_the_first_unreadable_image_ends_training(tmp_path):
    with pytest.raises(InputError, match="it is empty"):
        read(some_damaged(tmp_path, (3,)))


def test_folders_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        open_split(DataConfig(f"folder:{tmp_path}/missing"), "train")
    with pytest.raises(InputError, match="there is no split 'train'; there are none"):
        open_split(DataConfig(f"folder:{tmp_path}"), "train")
    os.makedirs(tmp_path / "train")
    with pytest.raises(InputError, match=r"holds neither class folders nor a labels.txt"):
        open_split(DataConfig(f"folder:{tmp_path}"), "train")
    os.makedirs(tmp_path / "train" / "empty_class")
    with pytest.raises(InputError, match="train holds no image"):
        open_split(DataConfig(f"folder:{tmp_path}"), "train")
    with pytest.raises(InputError, match="there is no split 'test'; there are 'train'"):
        open_split(DataConfig(f"folder:{tmp_path}"), "test")


def test_a_flat_validation_folder_takes_its_labels_from_a_file(tmp_path):
    for name in ("train/ant/deep/deeper/1.jpg", "train/bee/1.JPEG", "val/b.jpg", "val/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    labels = tmp_path / "val/labels.txt"
    labels.write_text("bee\nant\n")
    source = open_split(DataConfig(f"folder:{tmp_path}"), "test")
    assert source.class_names == open_split(DataConfig(f"folder:{tmp_path}"), "train").class_names == ("ant", "bee")
    assert [(source.files[index], source[index][1]) for index in range(2)] == [("a.jpg", 1), ("b.jpg", 0)]
    labels.write_text("bee\n")
    with pytest.raises(InputError, match=r"labels.txt has 1 lines, and 2 images lie beside it"):
        open_split(DataConfig(f"folder:{tmp_path}"), "test")
    labels.write_text("bee\nwasp\n")
    with pytest.raises(InputError, match=r"labels.txt, line 2: 'wasp' is none of the classes"):
        open_split(DataConfig(f"folder:{tmp_path}"), "test")


def test_splits_may_lack_classes_and_have_others_only_where_allowed(tmp_path, caplog):
    for name in ("train/ant/1.jpg", "train/bee/1.jpg", "val/ant/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    data = DataConfig(f"folder:{tmp_path}")
    assert open_split(data, "test").class_names == ("ant", "bee")
    assert "split 'test' has no image of bee" in caplog.text
    (tmp_path / "val/wasp").mkdir()
    (tmp_path / "val/wasp/1.jpg").write_bytes(JPEG)
    with pytest.raises(InputError, match=r"split 'test' has classes that no training image has: wasp; --data.other"):
        open_split(data, "test")
    allowed = dataclasses.replace(data, other_classes=True)
    assert {open_split(allowed, split).class_names for split in ("train", "test")} == {("ant", "bee", "wasp")}


@pytest.mark.parametrize("name", ["upright.jpg", "turned.jpg"])
def test_fast_decoding_gives_nearly_the_same_image_at_a_fraction_of_the_size(name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6 if name == "turned.jpg" else 1
    large = encoded(PICTURE.resize((1920, 1280)), "JPEG", quality=95, exif=exif)
    data = DataConfig(folder_of(tmp_path, {name: large}))
    sources = [open_split(dataclasses.replace(data, fast_decode=quick), "test") for quick in (False, True)]
    whole, small = (source.read(0, 3, (100, 200))[0] for source in sources)
    assert sorted(whole.shape[:2]) == [1280, 1920]
    assert sorted(small.shape[:2]) in ([160, 240], [320, 480])
    feed = {"image_size": (64, 64), "channels": 3, "batch_size": 1}
    exact, fast = (next(eval_batches(source, data, **feed))["image"].astype(int) for source in sources)
    assert np.abs(exact - fast).mean() < 2


@pytest.mark.parametrize("name", REFUSED)
def test_fast_decoding_refuses_the_same_files(name, tmp_path):
    content, reason = REFUSED[name]
    with pytest.raises(InputError, match=f"{name} cannot be read as an image: .*({reason})"):
        open_split(DataConfig(folder_of(tmp_path, {name: content})), "train").read(0, 3, (8, 8))
