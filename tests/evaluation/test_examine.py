"""eval.py --attack and --explain: tables over test images, and images that others can read."""

import commands
import numpy as np
import pytest
from PIL import Image
from small_models import small_model

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.evaluation.examine import attack_model, explain_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of the ten digits with random parameters, which is easily fooled."""
    folder = tmp_path_factory.mktemp("examine") / "m"
    sizes = {"image_size": 16, "patch_size": 8, "word_stride": 2, "in_channels": 1, "num_classes": 10}
    tnt_jax.save_model(small_model(**sizes), folder, class_names=[str(digit) for digit in range(10)], crop=1.0)
    return str(folder)


def test_attacked_images_are_near_and_give_the_same_accuracy_when_they_are_read_back(model, tmp_path):
    attacked = str(tmp_path / "attacked")
    options = {"attack": "pgd", "epsilon": 4 / 255, "steps": 5, "count": 80, "batch_size": 16}
    (row,) = attack_model(model, ["digits"], out=attacked, **options)
    assert (row["images"], row["epsilon"], row["steps"]) == (80, "4/255", "5")
    assert row["attacked_top1"] <= row["top1"]
    assert len(list((tmp_path / "attacked/test").rglob("*.png"))) == 80
    (tmp_path / "attacked/train").symlink_to("test")
    code, out, err = commands.run("eval.py", model, "--source", f"folder:{attacked}", "--table", tmp_path / "t.csv")
    assert code == 0, err
    assert f"{100 * row['attacked_top1']:.2f}" in out


def test_explanations_have_a_row_each_and_one_in_random_order(model):
    options = {"methods": ("rollout", "grad-cam"), "size": "words", "count": 12, "batch_size": 6}
    rows = list(explain_model(model, ["digits"], **options))
    assert [row["method"] for row in rows] == ["gradient-weighted rollout", "Grad-CAM", "random order"]
    for row in rows:
        assert row["images"] == 12
        assert 0 <= row["deletion"] <= 1
        assert row["insertion_low"] <= row["insertion"] <= row["insertion_high"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attack", "fgsm", "--epsilon", "3"], "epsilon is 3, and must be a number above 0"),
        (["--attack", "pgd", "--steps", "0"], "--steps is 0, and must be at least 1"),
        (["--attack", "pgd", "--images", "0"], "--images is 0, and must be at least 1"),
        (["--attack", "pgd", "--attack-out", "."], ". exists; choose another folder"),
        (["--explain", "cam"], "there is no method 'cam'; there are rollout"),
        (["--explain", "rollout", "--size", "pixels"], "rollout has no map of pixels; it has sentences and words"),
        (["--explain", "rollout", "--attack", "pgd"], "--attack and --explain are two tables"),
        (["--explain", "rollout", "--per-class"], "--per-class is of the plain evaluation"),
    ],
)
def test_what_cannot_be_examined_is_said(flags, message, model):
    code, _, err = commands.run("eval.py", model, "--source", "digits", *flags)
    assert code == 2
    assert message in err


def test_images_of_other_depths_are_refused(model, tmp_path):
    for name in ("train", "test"):
        for digit in range(10):
            (tmp_path / name / str(digit)).mkdir(parents=True)
            pixels = np.random.default_rng(digit).integers(0, 65536, (16, 16), np.uint16)
            Image.fromarray(pixels).save(tmp_path / name / str(digit) / "a.png")
    with pytest.raises(InputError, match="has pixels of uint16, and --attack is defined for 8 bits"):
        attack_model(model, [f"folder:{tmp_path}"], attack="fgsm", epsilon=8 / 255, steps=1)
