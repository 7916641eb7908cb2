"""eval.py --explain: how faithful explanations are, over test images."""

import commands
import jax
import numpy as np
import pytest
from PIL import Image
from small_models import small_model

import tnt_jax
from tnt_jax.evaluation.faithfulness import deletion_and_insertion, explain_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of the ten digits with random parameters, ."""
    folder = tmp_path_factory.mktemp("examine") / "m"
    sizes = {"image_size": 16, "patch_size": 8, "word_stride": 2, "in_channels": 1, "num_classes": 10}
    tnt_jax.save_model(small_model(**sizes), folder, class_names=[str(digit) for digit in range(10)], crop=1.0)
    return str(folder)


@pytest.mark.slow
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
        (["--explain", "cam"], "there is no method 'cam'; there are rollout"),
        (["--explain", "rollout", "--size", "pixels"], "rollout has no map of pixels; it has sentences and words"),
        (["--explain", "rollout", "--images", "0"], "--images is 0, and must be at least 1"),
        (["--explain", "rollout", "--probe", "knn"], "--probe and --explain are two tables"),
        (["--explain", "rollout", "--per-class"], "--per-class is of the plain evaluation"),
        (["--images", "3"], "--images is of --explain, which was not given"),
        (["--probe", "knn", "--size", "words"], "--size is of --explain, which was not given"),
    ],
)
def test_what_cannot_be_examined_is_said(flags, message, model):
    code, _, err = commands.run("eval.py", model, "--source", "digits", *flags)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_insertion_begins_with_a_blurred_image_and_deletion_ends_with_the_mean_colour(model):
    network = tnt_jax.load_model(model)
    images = 3 * np.random.default_rng(0).standard_normal((2, 2, 2)).repeat(8, 1).repeat(8, 2).astype(np.float32)
    classes = np.asarray(network(images[..., None])).argmax(axis=1)

    def of_class(images):
        return np.asarray(jax.nn.softmax(network(images[..., None])))[[0, 1], classes]

    def resized(image, side):  # Pillow's own, antialiased
        return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))

    blurred, mean_colour = np.stack([resized(resized(each, 2), 16) for each in images]), np.zeros_like(images)
    maps = np.ones((2, 2, 2), np.float32)
    deleted, inserted = deletion_and_insertion(network, images[..., None], classes, maps, steps=4)
    for found, expected in ((inserted[:, 0], blurred), (inserted[:, -1], images), (deleted[:, 0], images)):
        np.testing.assert_allclose(found, of_class(expected), atol=1e-4)
    np.testing.assert_allclose(deleted[:, -1], of_class(mean_colour), atol=1e-4)
    assert np.abs(of_class(blurred) - of_class(mean_colour)).max() > 1e-3
