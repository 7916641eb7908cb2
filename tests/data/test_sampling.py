"""How often an epoch sees what is rare, and that its batches stay a function of (seed, step)."""

import dataclasses
import time

import numpy as np
import pytest

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.check import check_splits
from tnt_jax.data.pipeline import epoch_order, train_batches
from tnt_jax.data.sampling import image_shares
from tnt_jax.data.sources import Split
from tnt_jax.tasks.weights import images_per_class

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [400, 90, 10]))
MANY = np.zeros((500, 3), np.float32)
MANY[:400, 0], MANY[300:390, 1], MANY[385:395, 2] = 1, 1, 1  # 100 images have none, some have two or three


def order_of(targets, sampling, epoch=0, seed=0):
    return epoch_order(len(targets), seed, epoch, image_shares(targets, sampling, 3))


@pytest.mark.parametrize("epoch", range(3))
def test_balanced_classes_have_the_same_places_and_share_them_among_their_images(epoch):
    order = order_of(LABELS, "balanced", epoch)
    counts = images_per_class(LABELS[order], 3)
    assert counts.sum() == 500
    assert np.abs(counts - 500 / 3).max() <= 1
    seen = np.bincount(order, minlength=500)
    for label, expected in ((0, 500 / 3 / 400), (1, 500 / 3 / 90), (2, 500 / 3 / 10)):
        of_class = seen[label == LABELS]
        assert set(of_class) <= {np.floor(expected), np.ceil(expected)}


def test_sqrt_is_in_proportion_to_the_root_of_how_many_images_a_class_has():
    roots = np.sqrt([400, 90, 10])
    counts = images_per_class(LABELS[order_of(LABELS, "sqrt")], 3)
    assert np.abs(counts - 500 * roots / roots.sum()).max() <= 1


def test_an_image_of_several_labels_has_the_places_that_its_rarest_gives_it():
    seen = np.bincount(order_of(MANY, "balanced"), minlength=500)
    # 305 images have label 0 alone or as their most rare one, 85 label 1, 10 label 2, 100 none.
    weights = np.select([MANY[:, 2] > 0, MANY[:, 1] > 0, MANY[:, 0] > 0], [1 / 10, 1 / 90, 1 / 400], 1 / 100)
    expected = 500 * weights / weights.sum()
    assert (np.abs(seen - expected) < 1).all()
    assert images_per_class(MANY[order_of(MANY, "balanced")], 3)[2] > 5 * images_per_class(MANY, 3)[2]


def test_the_natural_order_is_what_it_was():
    assert image_shares(LABELS, "natural", 3) is None
    expected = np.random.default_rng((7, 0, 4)).permutation(500)
    np.testing.assert_array_equal(order_of(LABELS, "natural", epoch=4, seed=7), expected)


def test_each_epoch_and_seed_has_an_order_of_its_own_and_it_is_shuffled():
    first, other, seed = (order_of(LABELS, "balanced", *at) for at in ((0, 0), (1, 0), (0, 1)))
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, seed)
    np.testing.assert_array_equal(first, order_of(LABELS, "balanced"))
    halves = [images_per_class(LABELS[half], 3) for half in np.split(first, 2)]
    assert np.abs(halves[0] - halves[1]).max() < 50


def test_a_million_images_are_ordered_in_seconds():
    labels = np.random.default_rng(0).integers(0, 1000, 10**6)
    began = time.process_time()
    assert len(epoch_order(10**6, 0, 0, image_shares(labels, "sqrt", 1000))) == 10**6
    assert time.process_time() - began < 5


def source_of(targets):
    images = np.arange(len(targets))[:, None, None, None] + np.zeros((1, 8, 8, 1))
    return Split(images.astype(np.uint8), targets, ("a", "b", "c"))


def batches(targets, data, steps, processes=1, start_step=0):
    """The batches of all processes, joined."""
    feed = {"image_size": (8, 8), "channels": 1, "batch_size": 8, "seed": 3, "start_step": start_step}
    parts = [
        train_batches(source_of(targets), data, **feed, rows=range(8)[index * 8 // processes :][: 8 // processes])
        for index in range(processes)
    ]
    found = [[next(part) for part in parts] for _ in range(steps)]
    for part in parts:
        part.close()
    return [{name: np.concatenate([each[name] for each in step]) for name in step[0]} for step in found]


def bytes_of(found):
    return [(batch["image"].tobytes(), batch["label"].tobytes()) for batch in found]


CASES = [("single_label", LABELS, "balanced"), ("single_label", LABELS, "sqrt"), ("multi_label", MANY, "balanced")]
CASES += [("multi_label", MANY, "sqrt"), ("regression", MANY + 0.5, "natural")]


@pytest.mark.parametrize(("task", "targets", "sampling"), CASES)
def test_batches_depend_on_seed_and_step_alone(task, targets, sampling):
    data = DataConfig.plain("any", task=task, sampling=sampling, random_flip=0.5)
    reference = bytes_of(batches(targets, data, 66))  # an epoch of 62 steps and a little
    for processes, workers in ((4, 0), (1, 2)):
        chosen = dataclasses.replace(data, num_workers=workers)
        assert bytes_of(batches(targets, chosen, 2, processes, start_step=61)) == reference[61:63]


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("task", "targets", "sampling"), CASES)
def test_batches_of_every_layout(task, targets, sampling, repeats, processes, workers):
    data = DataConfig.plain("any", task=task, sampling=sampling, random_flip=0.5, repeats=repeats)
    reference = batches(targets, data, 4, start_step=30)
    chosen = dataclasses.replace(data, num_workers=workers, num_threads=1 + workers)
    assert bytes_of(batches(targets, chosen, 4, processes, start_step=30)) == bytes_of(reference)


def test_batches_have_the_labels_of_their_images():
    for task, targets, sampling in CASES:
        data = DataConfig.plain("any", task=task, sampling=sampling)
        (batch,) = batches(targets, data, 1)
        kind = np.int32 if task == "single_label" else np.float32
        assert batch["label"].dtype == kind
        assert batch["label"].shape == (8, *targets.shape[1:])
        for pixel, label in zip(batch["image"][:, 0, 0, 0], batch["label"], strict=True):
            same = targets[pixel::256]  # of the images that have these pixels
            assert (same == label).reshape(len(same), -1).all(axis=1).any()


WRONG = {
    "classes for labels": (
        "multi_label",
        LABELS,
        r"targets of shape \(500,\) and 3 names; data.task multi_label needs 0",
    ),
    "labels for classes": ("single_label", MANY, "data.task single_label needs one class of each image"),
    "other names": ("regression", MANY[:, :2], r"targets of shape \(500, 2\) and 3 names"),
    "NaN": ("regression", np.where(MANY > 0, np.nan, 1), "has nan for 'a' of image 0; .* needs finite numbers"),
    "halves": ("multi_label", MANY / 2, "has 0.5 for 'a' of image 0; .* needs 0 or 1"),
    "one value": ("regression", MANY * [1, 0, 1] + [0, 5, 0], "target 'b' is 5 for all 500 .* nothing to learn"),
    "a class too many": ("single_label", LABELS + 1, "has labels from 1 to 3, and there are 3 classes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_targets_that_do_not_fit_the_task_are_refused(kind):
    task, targets, message = WRONG[kind]
    source = source_of(targets)
    with pytest.raises(InputError, match=message):
        check_splits(source, source, DataConfig("any", task=task), 1)
