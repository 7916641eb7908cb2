import commands
import numpy as np
import pytest
from PIL import Image

from tnt_jax.tasks.table import TASKS


def run(*flags):
    return commands.run("visualize.py", "batch", commands.ROOT / "configs/imagenet_tnt_s.py", *flags)


@pytest.fixture
def flags(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(8):
        path = tmp_path / "photos/train" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return [
        "--data.source", f"folder:{tmp_path / 'photos'}", "--data.repeats", 1, "--batch-size", 4,
        "--model.image-size", 32, "--model.in-channels", 3, "--out", tmp_path / "batch.png",
    ]  # fmt: skip


def test_the_picture_shows_originals_and_what_is_fed(flags, tmp_path):
    _, out, _ = run(*flags, "--count", 4, "--data.mixup", 0, "--data.cutmix", 0, "--data.erasing", 0)
    picture = np.asarray(Image.open(tmp_path / "batch.png"))
    assert f"{tmp_path / 'batch.png'} shows batch of" in out
    assert picture.std() > 10


@pytest.mark.slow
def test_another_step_shows_other_images(flags, tmp_path):
    pictures = []
    for step in (0, 0, 1):
        run(*flags, "--step", step, "--data.mixup", 0, "--data.cutmix", 0, "--data.erasing", 0)
        pictures.append((tmp_path / "batch.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_captions_tell_the_class_and_the_mixing_weights():
    names = ("ant", "bee", "cat", "dog")
    caption = TASKS["single_label"].caption
    assert caption(np.int32(0), np.array([0.7, 0.3, 0.0, 0.0]), names) == "ant\n0.70 ant, 0.30 bee"
    assert caption(np.int32(2), np.array([0.0, 0.0, 1.0, 0.0]), names) == "cat\n1.00 cat"


def test_captions_tell_labels_and_numbers():
    names, labels = ("ant", "bee", "cat"), np.array([1.0, 0.0, 1.0])
    caption = TASKS["multi_label"].caption
    assert caption(labels, np.array([0.7, 0.3, 1.0]), names) == "ant, cat\n1.00 cat, 0.70 ant, 0.30 bee"
    assert caption(np.zeros(3), np.zeros(3), names) == "none\nnone"
    numbers = np.array([1990.0, 0.25]), np.array([1995.0, 0.5])
    caption = TASKS["regression"].caption(*numbers, ("year", "share"))
    assert caption == "year 1990, share 0.25\nyear 1995, share 0.5"


def test_a_step_below_zero_is_refused(flags):
    code, _, err = run(*flags, "--step", -1)
    assert code == 2
    assert "--step is -1" in err
