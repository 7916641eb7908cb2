"""(source, seed, step) to a batch: the same images in the same order with the same augmentation, from any step."""

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from tnt_jax.config import DataConfig, InputError, check_data
from tnt_jax.data.augment import augment, fill_of
from tnt_jax.data.crop import evaluation_crop
from tnt_jax.data.moving import Places, fitted
from tnt_jax.data.samples import Pixels, to_channels, to_depth
from tnt_jax.data.sampling import Shares, image_shares, weighted_order
from tnt_jax.data.sources import Split, Target
from tnt_jax.data.workers import Filled, prepare
from tnt_jax.tasks.table import TASKS

Batch = dict[str, np.ndarray]
logger = logging.getLogger(__name__)


def target_shape(recipe: "TrainRecipe | EvalRecipe") -> tuple[int, ...]:
    """Of the target of an image."""
    task, outputs = TASKS[recipe.data.task], len(recipe.source.class_names)
    return task.label_shape(outputs, recipe.row_shape[:2])


def target_dtype(recipe: "TrainRecipe | EvalRecipe") -> str:
    """Of the target of an image."""
    return TASKS[recipe.data.task].label_dtype


def steps_per_epoch(count: int, data: DataConfig, batch_size: int) -> int:
    """Batches of an epoch over `count` images; the last incomplete one is left out.

    With repeated augmentation an epoch has as many places as there are images, rounded down to a multiple of 256, as
    DeiT's RASampler has it, and so sees 1 / repeats of the images.

    Raises:
        InputError: not even one batch comes together.
    """
    places = count if data.repeats == 1 else count // 256 * 256
    if not places // batch_size:
        repeated = f" with data.repeats {data.repeats} (1 gives {count // batch_size})" if data.repeats > 1 else ""
        raise InputError(f"{count} training images do not fill one batch of batch_size {batch_size}{repeated}")
    return places // batch_size


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int, shares: Shares | None = None) -> np.ndarray:
    """The images of an epoch in their random order, int (count,); each once, or as often as its share says."""
    rng = np.random.default_rng((seed, 0, epoch))
    return rng.permutation(count).astype(np.int32) if shares is None else weighted_order(shares, rng)


@functools.lru_cache(maxsize=8)
def places_of_batch(first: int, batch_size: int, repeats: int) -> np.ndarray:
    """The places in the order of an epoch of the rows of a batch, from the place of the first of its images on.

    The copies of an image stand far apart in the batch, and so on different devices, as DeiT has them.

    Args:
        first: how many copies of the first image the batch before has taken.
    """
    places = first + np.arange(batch_size)
    places = places[np.argsort(places % repeats, kind="stable")] // repeats
    places.flags.writeable = False  # everybody is given the same array
    return places


@dataclasses.dataclass(frozen=True)
class TrainRecipe:
    """The training batch of every step."""

    source: Split
    data: DataConfig
    row_shape: tuple[int, int, int]
    batch_size: int
    seed: int
    dtype: str = "uint8"
    shares: Shares | None = None
    """The frequency of each image in an epoch; None for each once."""

    @property
    def target_shape(self) -> tuple[int, ...]:
        return target_shape(self)

    @property
    def target_dtype(self) -> str:
        return target_dtype(self)

    def fill(self, step: int, rows: Sequence[int], images: np.ndarray, targets: np.ndarray) -> list[tuple[int, str]]:
        """Writes rows of the batch: images (rows, height, width, channels) of `dtype`, and their targets.

        Returns:
            The images that turned out to be unreadable, and why.
        """
        order, places = self.places(step, rows)
        unreadable = []
        for at, row in enumerate(rows):
            images[at], targets[at] = self._image(order, int(places[at]), (self.seed, 1, step, row), unreadable)
        return unreadable

    def places(self, step: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The images of the epoch in their order, and where in it these rows of the batch stand."""
        epoch, step_of_epoch = divmod(step, steps_per_epoch(len(self.source), self.data, self.batch_size))
        first, copies = divmod(step_of_epoch * self.batch_size, self.data.repeats)
        places = places_of_batch(copies, self.batch_size, self.data.repeats)
        return epoch_order(len(self.source), self.seed, epoch, self.shares), first + places[np.asarray(rows)]

    def _image(
        self, order: np.ndarray, place: int, seed: tuple[int, ...], unreadable: list[tuple[int, str]]
    ) -> tuple[Pixels, Target]:
        """The image at this place of the epoch, or, in place of an unreadable one, the next that can be read."""
        for attempt in range(most_unreadable(self.data, len(self.source)) + 1):
            index = int(order[(place + attempt) % len(order)])
            try:
                return prepared(self, index, lambda pixels: self._augmented(pixels, np.random.default_rng(seed)))
            except InputError as error:
                unreadable.append((index, str(error)))
        raise _too_many(self, dict(unreadable))

    def _augmented(self, pixels: Pixels, rng: np.random.Generator) -> tuple[Pixels, Places]:
        data = self.data
        if not (data.crop_area or data.simple_crop or data.scale_jitter or TASKS[data.task].dense):
            interpolation = "bicubic" if data.interpolation == "random" else data.interpolation
            pixels = evaluation_crop(pixels, self.row_shape[:2], data.crop, interpolation)
        return augment(pixels, self.data, self.row_shape[:2], rng)


def read(recipe: "TrainRecipe | EvalRecipe", index: int) -> tuple[Pixels, Target]:
    """An image of the source in the channels and the type of the batch; see `read_image` for what is made smaller."""
    at_least = tuple(round(2 * side / recipe.data.crop) for side in recipe.row_shape[:2])
    pixels, target = recipe.source.read(index, recipe.row_shape[2], at_least)
    if pixels.dtype == recipe.dtype and pixels.shape[2] == recipe.row_shape[2]:
        return pixels, target
    name = recipe.source.image_name(index)
    if pixels.dtype != recipe.dtype and recipe.data.depth is None:
        raise InputError(
            f"{name} has samples of {pixels.dtype}, and the first image has {recipe.dtype}; "
            f"--data.depth {recipe.dtype} converts all"
        )
    try:
        return to_channels(to_depth(pixels, recipe.dtype), recipe.row_shape[2]), target
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def prepared(
    recipe: "TrainRecipe | EvalRecipe", index: int, prepare_one: Callable[[Pixels], tuple[Pixels, Places]]
) -> tuple[Pixels, Target]:
    """An image of the source as it goes into the batch, and its target, which of a dense task moves with it. Whatever
    is raised for it names it."""
    pixels, target = read(recipe, index)
    try:
        pixels, places = prepare_one(pixels)
        return pixels, TASKS[recipe.data.task].moved(target, places)
    except MemoryError as error:
        raise InputError(f"{recipe.source.image_name(index)}: there is not enough memory to resize it") from error


def sample_of(source: Split, unreadable: int = 0, channels: int | None = None) -> Pixels:
    """The first image of a source that can be read, of which so many may be unreadable.

    Raises:
        InputError: none of the first few can be read.
    """
    for index in range(len(source)):
        try:
            return source.read(index, channels)[0]
        except InputError:
            if index >= min(unreadable, MOST_ATTEMPTS, len(source) - 1):
                raise
    raise InputError("the source has no images")


MOST_ATTEMPTS = 10


def dtype_of(source: Split, data: DataConfig, channels: int | None = None) -> str:
    """The type of the images of a batch: `data.depth`, or that of the first image."""
    if data.depth:
        return data.depth
    return str(sample_of(source, most_unreadable(data, len(source)), channels).dtype)


def most_unreadable(data: DataConfig, count: int) -> int:
    """The number of images that may be unreadable of so many training images."""
    return math.floor(data.skip_unreadable * count)


def _too_many(recipe: TrainRecipe, unreadable: dict[int, str]) -> InputError:
    reason = list(unreadable.values())[-1]
    if not recipe.data.skip_unreadable:
        return InputError(
            f"{reason}; --data.skip-unreadable 0.01 trains without up to 1% of the images, and "
            f"tnt-check {recipe.data.source} lists all that cannot be read"
        )
    return InputError(
        f"{len(unreadable)} of {len(recipe.source)} training images are unreadable, and data.skip_unreadable "
        f"{recipe.data.skip_unreadable} allows {most_unreadable(recipe.data, len(recipe.source))}; the last: {reason}"
    )


@dataclasses.dataclass(frozen=True)
class EvalRecipe:
    """Every image once, in the order of the source; what is left of the last batch is black and of class 0."""

    source: Split
    data: DataConfig
    row_shape: tuple[int, int, int]
    batch_size: int
    interpolation: str = "bicubic"
    dtype: str = "uint8"

    @property
    def target_shape(self) -> tuple[int, ...]:
        return target_shape(self)

    @property
    def target_dtype(self) -> str:
        return target_dtype(self)

    def fill(self, step: int, rows: Sequence[int], images: np.ndarray, targets: np.ndarray) -> list:
        for at, row in enumerate(rows):
            index = step * self.batch_size + row
            if index >= len(self.source):
                images[at], targets[at] = 0, 0
                continue
            images[at], targets[at] = prepared(self, index, self._cropped)
        return []

    def _cropped(self, pixels: Pixels) -> tuple[Pixels, Places]:
        size = self.row_shape[:2]
        if TASKS[self.data.task].dense:  # also what a crop would leave out counts
            return fitted(pixels, size, Image.Resampling[self.interpolation.upper()], fill_of(pixels, self.data))
        pixels = evaluation_crop(pixels, size, self.data.crop, self.interpolation)
        return pixels, Places.of_box((0, 0, *size), size)


def train_recipe(
    source: Split,
    data: DataConfig,
    *,
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    seed: int,
    dtype: str | None = None,
) -> TrainRecipe:
    """The recipe behind `train_batches`."""
    shares = None
    if data.sampling != "natural" or source.weights is not None:  # else the targets of records need not be read
        shares = image_shares(source.all_targets, data.sampling, len(source.class_names), source.weights)
    dtype = dtype or dtype_of(source, data, channels)
    return TrainRecipe(source, data, (*image_size, channels), batch_size, seed, dtype, shares)


def train_batches(
    source: Split,
    data: DataConfig,
    *,
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    dtype: str | None = None,
) -> Iterator[Batch]:
    """Batches without end, beginning with that of `start_step`.

    Each is {"image": (rows, height, width, channels), "label": int32 (rows,), float32 (rows, outputs) or uint16 (rows,
    height, width)}.
    Images are of `dtype`; by default of `data.depth`, or of the type of the first, which is read for it. `batch_size`
    counts the images of a step over all processes; `rows` are those of them that this one wants, by default all. The
    workers end when the iterator is closed or the process ends.

    Raises:
        InputError: an image is unreadable, and more than `data.skip_unreadable` of them are. At once, when the sizes
            do not fit.
        WorkerError: a worker process died.
    """
    check_data(data)
    steps_per_epoch(len(source), data, batch_size)
    sizes = {"image_size": image_size, "channels": channels, "batch_size": batch_size}
    recipe = train_recipe(source, data, **sizes, seed=seed, dtype=dtype)
    filled = _prepare(recipe, range(start_step, sys.maxsize), range(batch_size) if rows is None else rows)
    return _without_unreadable(filled, recipe)


def _prepare(recipe, steps: range, rows: Sequence[int]) -> Iterator[Filled]:
    check_data(recipe.data)
    return prepare(recipe, rows, steps, num_workers=recipe.data.num_workers, num_threads=recipe.data.num_threads)


def _without_unreadable(filled: Iterator[Filled], recipe: TrainRecipe) -> Iterator[Batch]:
    unreadable: dict[int, str] = {}
    most = most_unreadable(recipe.data, len(recipe.source))
    for images, targets, reports in filled:
        for index, reason in reports:
            if index in unreadable:
                continue
            unreadable[index] = reason
            if len(unreadable) > most:
                raise _too_many(recipe, unreadable)
            logger.warning("skipped unreadable image %d of at most %d: %s", len(unreadable), most, reason)
        yield {"image": images, "label": targets}


def eval_batches(
    source: Split,
    data: DataConfig,
    *,
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    interpolation: str = "bicubic",
    dtype: str | None = None,
) -> Iterator[Batch]:
    """Every image exactly once over all processes.

    As in `train_batches`, with "mask" bool (rows,), False in the rows that fill up the last batch. Every process gets
    the same number of batches.
    """
    dtype = dtype or dtype_of(source, dataclasses.replace(data, skip_unreadable=0.0), channels)
    recipe = EvalRecipe(source, data, (*image_size, channels), batch_size, interpolation, dtype)
    steps = range(-(-len(source) // batch_size))
    rows = range(batch_size) if rows is None else rows
    return _with_mask(_prepare(recipe, steps, rows), recipe, rows)


def _with_mask(filled: Iterator[Filled], recipe: EvalRecipe, rows: Sequence[int]) -> Iterator[Batch]:
    for step, (images, targets, _) in enumerate(filled):
        index = step * recipe.batch_size + np.asarray(rows)
        yield {"image": images, "label": targets, "mask": index < len(recipe.source)}
