"""Two splits that belong together: checked before a run writes anything, and recognised when it goes on."""

import hashlib
import itertools
import logging
import math
import os

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.augment import has_colours
from tnt_jax.data.pipeline import most_unreadable, sample_of
from tnt_jax.data.samples import to_channels
from tnt_jax.data.sources import ImageFiles, Images, Split
from tnt_jax.data.tables import listed
from tnt_jax.tasks.table import TASKS

MAX_SIZES = 200_000
logger = logging.getLogger(__name__)


def check_splits(train: Split, test: Split, data: DataConfig, channels: int) -> tuple[str, str]:
    """Makes sure that both splits have images that can be decoded, labels, and the same classes.

    Returns:
        The type of the images of each split in a batch: that of its first, or `data.depth`.

    Raises:
        InputError: they do not.
    """
    for name in ("mean", "std"):
        count = np.size(getattr(data, name))
        if count not in (1, channels):
            raise InputError(
                f"data.{name} has {count} numbers, and should have one, or one for each of {channels} channels"
            )
    dtypes, task = [], TASKS[data.task]
    for source in (train, test):
        name = f"split {source.name!r} of {data.source}"
        if not len(source):
            raise InputError(f"{name} has no images")
        # Where labels come with their images, each is a class: all are read only for a task that needs other ones.
        if source.targets is not None or not task.one_class:
            task.check_labels(source.all_targets, source.class_names, name)
            if source is train and (reason := task.nothing_to_learn(source.all_targets, source.class_names)):
                raise InputError(f"{reason} of {data.source}; there is nothing to learn")
        _check_not_empty(source, name, data, source is train)
        pixels = sample_of(source, most_unreadable(data, len(source)) if source is train else 0, channels)
        dtypes.append(data.depth or str(pixels.dtype))
        if source is train:
            _say_what_is_special(pixels, data)
        try:
            to_channels(pixels, channels)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    if train.class_names != test.class_names:
        pairs = itertools.zip_longest(train.class_names, test.class_names)
        first = next(pair for pair in pairs if pair[0] != pair[1])
        raise InputError(
            f"{data.source} has {len(train.class_names)} classes in {train.name!r} and {len(test.class_names)} "
            f"in {test.name!r}, which differ first in {first[0]!r} and {first[1]!r}; both must have the same"
        )
    return dtypes[0], dtypes[1]


def _check_not_empty(source: Split, name: str, data: DataConfig, training: bool) -> None:
    """Raises InputError where more files are empty than may be: their sizes tell, without reading them.

    Of more files than `MAX_SIZES` they are not asked for, since each takes a way to the disk.
    """
    if not isinstance(source.images, ImageFiles) or len(source) > MAX_SIZES:
        return
    empty = [path for path in source.images if os.path.exists(path) and not os.path.getsize(path)]
    if len(empty) > (most_unreadable(data, len(source)) if training else 0):
        skipped = math.ceil(1e4 * len(empty) / len(source)) / 1e4
        remedy = f"; --data.skip-unreadable {skipped:g} trains without them" if training else "; take them out"
        raise InputError(f"{name}: {len(empty)} of {len(source)} files are empty: {listed(empty)}{remedy}")


def _say_what_is_special(pixels: np.ndarray, data: DataConfig) -> None:
    """The findings of the first image for all, and what augmentation leaves out because of it."""
    if pixels.dtype == np.uint16 and data.white is None and pixels.max() < 1 << 14:
        bits = max(1, int(pixels.max()).bit_length())
        logger.warning(
            "the first image has 16 bits and no sample above %d: if white is less than 65535, say it, such as "
            "--data.white %d; or measure mean and deviation with python -m tnt_jax.data.statistics",
            pixels.max(), 2**bits - 1,
        )  # fmt: skip
    if not has_colours(pixels) and (data.randaugment_ops or data.color_jitter or data.auto_augment == "3a"):
        logger.warning(
            "the images have %d channels of %s: what augmentation does to colours is left out, which is for 1 and 3 "
            "channels of 8 bits", pixels.shape[2], pixels.dtype,
        )  # fmt: skip


def content_of(source: Split) -> dict[str, str]:
    """The content of a split: the number of its images, and digests of class names, file names, labels and weights."""
    found = {
        "number of images": str(len(source)),
        "class names": _digest("\0".join(source.class_names).encode(errors="surrogateescape")),
    }
    if isinstance(source.images, Images) and (digest := source.images.digest()) is not None:
        found["records" if source.targets is None else "file names"] = digest
    if source.targets is not None:
        kind = "<i4" if source.targets.ndim == 1 else "<f4"
        found["labels"] = _digest(np.asarray(source.targets).astype(kind).tobytes())
    if source.weights is not None:
        found["weights"] = _digest(source.weights.astype("<f4").tobytes())
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
