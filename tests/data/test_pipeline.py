import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.pipeline import epoch_order, eval_batches, steps_per_epoch, train_batches
from tnt_jax.data.sources import Split

RECIPE = DataConfig()
FEED = {"image_size": (16, 24), "channels": 3}
BATCH = 8


def numbered(count):
    """Images whose label is their index, so that a batch tells which images it holds."""
    images = np.random.default_rng(0).integers(0, 256, (count, 20, 30, 3), np.uint8)
    return Split(images, np.arange(count), tuple(map(str, range(count))))


def take(count, batches):
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def global_batches(source, data, steps, processes=1, start_step=0):
    """What the processes hold together: each has every so-manieth row, as on a mesh whose hosts alternate."""
    parts = [
        take(
            steps,
            train_batches(
                source, data, **FEED, batch_size=BATCH, seed=3, start_step=start_step,
                rows=range(index, BATCH, processes),
            ),
        )
        for index in range(processes)
    ]  # fmt: skip
    return [{name: interleaved([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)]


def interleaved(parts):
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def assert_same(ours, reference):
    assert len(ours) == len(reference)
    for batch, expected in zip(ours, reference, strict=True):
        assert batch.keys() == expected.keys()
        for name in batch:
            assert batch[name].tobytes() == expected[name].tobytes()


@pytest.fixture(scope="module")
def source():
    return numbered(259)  # 32 batches of 8 in an epoch of 256 places, and a ragged end


@pytest.fixture(scope="module")
def reference(source):
    """Two epochs and a little, from one process without workers."""
    return global_batches(source, RECIPE, 2 * 32 + 3)


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (0, 2), (0, 4), (1, 2), (3, 1)])
def test_global_batches_do_not_depend_on_processes_and_workers(source, reference, processes, workers):
    data = dataclasses.replace(RECIPE, num_workers=workers, num_threads=1 + workers)
    assert_same(global_batches(source, data, 35, processes), reference[:35])


@pytest.mark.parametrize("step", [1, 31, 32, 64, 66])
def test_a_batch_read_directly_equals_the_one_read_in_order(source, reference, step):
    assert_same(global_batches(source, RECIPE, 1, start_step=step), reference[step : step + 1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_read_directly_on_another_number_of_processes_equals_the_one_read_in_order(source, reference, workers):
    data = dataclasses.replace(RECIPE, num_workers=workers)
    assert_same(global_batches(source, data, 3, processes=2, start_step=62), reference[62:65])


@pytest.mark.parametrize("interpolation", ["random", "bicubic", "bilinear"])
def test_the_middle_is_resized_by_the_filter_that_was_asked_for(source, interpolation):
    data = DataConfig.plain("digits", interpolation=interpolation)
    (batch,) = take(1, train_batches(source, data, **FEED, batch_size=BATCH, seed=3))
    wanted = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    for image, label in zip(batch["image"], batch["label"], strict=True):
        expected = Image.fromarray(source.images[label]).resize((24, 16), wanted)  # 30 x 20, of the same shape
        np.testing.assert_array_equal(image, expected)


def test_another_seed_gives_other_batches(source, reference):
    other = take(1, train_batches(source, RECIPE, **FEED, batch_size=BATCH, seed=4))
    assert not np.array_equal(other[0]["label"], reference[0]["label"])


def test_each_epoch_has_an_order_of_its_own(reference):
    first, second = (
        [label for batch in part for label in batch["label"]] for part in (reference[:32], reference[32:64])
    )
    assert first != second


def test_without_repeats_an_epoch_sees_every_image_at_most_once():
    data = dataclasses.replace(RECIPE, repeats=1)
    source = numbered(44)
    labels = [label for batch in global_batches(source, data, 5) for label in batch["label"]]
    assert len(set(labels)) == 40  # 44 images make 5 batches of 8
    assert steps_per_epoch(44, data, BATCH) == 5


def deit_sampler(order, ranks, rank):
    """DeiT's RASampler (samplers.py) for a given order."""
    count = len(order)
    per_rank = -(-count * 3 // ranks)
    repeated = [index for index in order for _ in range(3)]
    repeated += repeated[: per_rank * ranks - len(repeated)]
    return repeated[rank : per_rank * ranks : ranks][: count // 256 * 256 // ranks]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_repeated_augmentation_is_deits(source, reference, ranks):
    order = epoch_order(len(source), 3, 0)
    shares = [deit_sampler(order, ranks, rank) for rank in range(ranks)]
    each = BATCH // ranks
    assert len(shares[0]) // each == steps_per_epoch(len(source), RECIPE, BATCH) == 32
    for step in range(32):
        deits = [index for share in shares for index in share[step * each : (step + 1) * each]]
        assert sorted(deits) == sorted(reference[step]["label"])


def test_steps_of_an_imagenet_epoch():
    # The published run: floor(1281167 / 256) * 256 / 1024
    assert steps_per_epoch(1_281_167, RECIPE, 1024) == 1251


def test_copies_of_an_image_are_augmented_differently_and_stand_on_different_devices(source):
    data = dataclasses.replace(RECIPE, num_threads=4)
    batch = take(1, train_batches(source, data, **FEED, batch_size=48, seed=0))[0]
    for label in np.unique(batch["label"]):
        rows = np.flatnonzero(batch["label"] == label)
        assert len(rows) == 3
        assert len({row // 16 for row in rows}) == 3
        assert len({batch["image"][row].tobytes() for row in rows}) == 3


@pytest.mark.parametrize(
    ("count", "processes", "workers"),
    [(1, 1, 0), (1, 4, 0), (16, 1, 0), (16, 2, 0), (21, 1, 0), (21, 4, 0), (1, 2, 1), (16, 1, 3), (21, 2, 3)],
)
def test_evaluation_reads_every_image_exactly_once(count, processes, workers):
    data = dataclasses.replace(RECIPE, num_workers=workers)
    seen, lengths = [], set()
    for index in range(processes):
        batches = list(
            eval_batches(numbered(count), data, **FEED, batch_size=BATCH, rows=range(index, BATCH, processes))
        )
        lengths.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (BATCH // processes, 16, 24, 3)
            seen += batch["label"][batch["mask"]].tolist()
    assert sorted(seen) == list(range(count))
    assert len(lengths) == 1, "every process takes part in every step"


def test_the_images_of_evaluation_do_not_depend_on_processes(source):
    whole = take(2, eval_batches(source, RECIPE, **FEED, batch_size=BATCH))
    halves = [
        take(2, eval_batches(source, RECIPE, **FEED, batch_size=BATCH, rows=range(index, BATCH, 2)))
        for index in range(2)
    ]
    for batch, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(batch["image"], interleaved([part["image"] for part in parts]))


def test_small_grey_images_keep_their_shape_and_are_only_shifted():
    digits = Split(np.full((300, 8, 8, 1), 7, np.uint8), np.zeros(300, int), ("a",))
    data = dataclasses.replace(
        RECIPE, repeats=1, crop_area=None, crop=1.0, random_flip=0.0, randaugment_ops=0, color_jitter=0.0,
        random_shift=0.1,
    )  # fmt: skip
    batch = take(1, train_batches(digits, data, image_size=(32, 32), channels=1, batch_size=4, seed=0))[0]
    np.testing.assert_array_equal(batch["image"], np.full((4, 32, 32, 1), 7, np.uint8))


@pytest.mark.parametrize(
    ("count", "changes", "sizes", "message"),
    [
        (255, {}, {}, r"255 training images do not fill one batch of batch_size 8 with data.repeats 3 \(1 gives 31\)"),
        (7, {"repeats": 1}, {}, "7 training images do not fill one batch of batch_size 8"),
        (300, {"num_threads": 0}, {}, "data.num_threads is 0, and must be at least 1"),
        (300, {"num_workers": -1}, {}, "data.num_workers is -1, and must be at least 0"),
        (300, {"repeats": 0}, {}, "data.repeats is 0, and must be at least 1"),
        (300, {"random_flip": 1.5}, {}, "data.random_flip is 1.5, and must be at least 0 and at most 1"),
        (300, {"mixup": float("nan")}, {}, "data.mixup is nan, and must be finite"),
        (300, {"crop_area": (0.5, 0.2)}, {}, "data.crop_area is 0.5 to 0.2, and must rise"),
        (300, {"crop_aspect": (0, 2)}, {}, r"data.crop_aspect is \(0, 2\), and must be above 0$"),
        (300, {"crop": 0.0}, {}, "data.crop is 0.0, and must be above 0 and at most 1"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_read(count, changes, sizes, message):
    with pytest.raises(InputError, match=message):
        train_batches(numbered(count), dataclasses.replace(RECIPE, **changes), **FEED, batch_size=8, seed=0, **sizes)
