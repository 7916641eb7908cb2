"""The mixing of a batch on the device, inside jit: uint8 to normalised floats, labels to soft targets.

The order is that of the published run: mixed, normalised, erased. Mixing before or after normalising is the same thing,
but what is erased is noise in one image alone.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray

from tnt_jax.config import DataConfig
from tnt_jax.tasks.table import TASKS

Images = Float[Array, "batch height width channels"]
Scalar = Float[Array, ""]


@runtime_checkable
class Normalisation(Protocol):
    """The constants of normalisation: mean and standard deviation, one for all channels or one for each."""

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]


def normalise(images: Num[Array | np.ndarray, "batch height width channels"], by: Normalisation) -> Images:
    """Pixels to (x / white - mean) / std in float32. White is 255 in uint8, 65535 in uint16 and 1 in float32."""
    white = jnp.iinfo(images.dtype).max if jnp.issubdtype(images.dtype, jnp.integer) else 1
    return (images.astype(jnp.float32) / white - jnp.array(by.mean)) / jnp.array(by.std)


def prepare_training(
    images: Num[Array, "batch height width channels"],
    labels: Num[Array, "batch ..."],
    *,
    data: DataConfig,
    num_classes: int,
    key: PRNGKeyArray,
) -> tuple[Images, Float[Array, "batch classes"]]:
    """The inputs and targets of the network: mixed and erased images, and the soft targets of the task,
    mixed in the same shares.

    Sources: mixup arXiv 1710.09412, cutmix arXiv 1905.04899, erasing arXiv 1708.04896, as timm's FastCollateMixup and
    RandomErasing have them.
    """
    mix_key, erase_key = jax.random.split(key)
    inputs = normalise(images, data)
    targets = TASKS[data.task].soft_targets(labels, num_classes, data.label_smoothing)
    if data.mixup or data.cutmix:
        inputs, targets = mix(mix_key, inputs, targets, data)
    if data.erasing:
        inputs = erase(erase_key, inputs, data.erasing)
    return inputs, targets


GROUP = 128
"""Images that are mixed with each other by one draw: those of one of the eight GPUs of the published runs."""


def mix(
    key: PRNGKeyArray, inputs: Images, targets: Float[Array, "batch classes"], data: DataConfig
) -> tuple[Images, Float[Array, "batch classes"]]:
    """Mixup and cutmix in groups of 128 images; the last group has what is left.

    Each image is mixed with its mirror place in the group, the first with the last, and one draw decides for the group.
    The groups are rows of the batch, whatever devices they lie on: up to batch / 128 devices exchange no pixel.
    """
    count, rest = divmod(len(inputs), GROUP)
    if count == 0 or (count, rest) == (1, 0):
        return _mix_group(key, inputs, targets, data)
    # Folded in, not split: every device makes the keys of its own groups.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    whole = len(inputs) - rest
    parts = [x[:whole].reshape(count, GROUP, *x.shape[1:]) for x in (inputs, targets)]
    mixed = [x.reshape(whole, *x.shape[2:]) for x in jax.vmap(_mix_group, (0, 0, 0, None))(keys, *parts, data)]
    if rest:
        last = _mix_group(jax.random.fold_in(key, count), inputs[whole:], targets[whole:], data)
        mixed = [jnp.concatenate(both) for both in zip(mixed, last, strict=True)]
    return tuple(mixed)


def _mix_group(key: PRNGKeyArray, inputs: Images, targets: Array, data: DataConfig) -> tuple[Images, Array]:
    share, from_other = draw_mix(key, inputs.shape[1:3], data)
    kept = jnp.where(from_other, 0.0, jnp.where(from_other.any(), 1.0, share))[..., None]
    return kept * inputs + (1 - kept) * inputs[::-1], share * targets + (1 - share) * targets[::-1]


def draw_mix(key: PRNGKeyArray, size: tuple[int, int], data: DataConfig) -> tuple[Scalar, Bool[Array, "height width"]]:
    """The mixing of a group: the share that stays of each image, and the pixels that cutmix takes from its partner."""
    keys = jax.random.split(key, 4)
    mixes = jax.random.bernoulli(keys[0], data.mix_probability)
    cuts = jax.random.bernoulli(keys[1], data.cutmix_switch if data.mixup and data.cutmix else float(data.cutmix > 0))
    drawn = jax.random.uniform(keys[2])
    share = jnp.where(mixes, jnp.where(cuts, beta_quantile(drawn, data.cutmix), beta_quantile(drawn, data.mixup)), 1.0)
    box = cutmix_box(keys[3], size, share) & cuts
    # A box that reaches over the border is cut off, so that the area decides what share the image really keeps.
    return jnp.where(cuts, 1 - box.mean(), share), box


def beta_quantile(probability: Scalar, alpha: float) -> Scalar:
    """The number below which Beta(alpha, alpha) falls with `probability`; 1 for an alpha of 0.

    Read from a table, because XLA takes ten seconds to compile `jax.random.beta`.
    """
    if alpha == 0:
        return jnp.ones_like(probability)
    from scipy.special import betaincinv  # a quarter of a second, which a prediction does not need

    grid = np.linspace(0, 1, 10_001)
    return jnp.interp(probability, grid, betaincinv(alpha, alpha, grid))


def cutmix_box(key: PRNGKeyArray, size: tuple[int, int], share: Scalar) -> Bool[Array, "height width"]:
    """A rectangle of the image's aspect and area 1 - share around a random pixel, cut off at the border."""
    sides = []
    for side, side_key in zip(size, jax.random.split(key), strict=True):
        half = (side * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        centre = jax.random.randint(side_key, (), 0, side)
        place = jnp.arange(side)
        sides.append((place >= centre - half) & (place < centre + half))
    return sides[0][:, None] & sides[1][None, :]


ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


def erase(key: PRNGKeyArray, inputs: Images, probability: float) -> Images:
    """Fills a rectangle of an image with noise from N(0, 1), in each image with `probability`.

    The rectangle is the first of ten draws that is smaller than the image; if none is, nothing is erased.
    """
    batch, height, width, _ = inputs.shape
    keys = jax.random.split(key, 6)
    area = jax.random.uniform(keys[0], (batch, 10), minval=ERASED_AREA[0], maxval=ERASED_AREA[1]) * height * width
    log_aspect = jax.random.uniform(
        keys[1], (batch, 10), minval=jnp.log(ERASED_ASPECT[0]), maxval=jnp.log(ERASED_ASPECT[1])
    )
    tall, wide = (jnp.round(jnp.sqrt(area * jnp.exp(sign * log_aspect))) for sign in (1, -1))
    fits = (tall < height) & (wide < width)
    first = fits.argmax(axis=1, keepdims=True)
    chosen = jax.random.bernoulli(keys[2], probability, (batch,)) & fits.any(axis=1)
    inside = chosen[:, None, None]
    for axis, side, side_key, extents in ((1, height, keys[3], tall), (2, width, keys[4], wide)):
        extent = jnp.take_along_axis(extents, first, axis=1)
        start = jnp.floor(jax.random.uniform(side_key, (batch, 1)) * (side - extent + 1))
        place = jnp.arange(side)
        inside &= jnp.expand_dims((place >= start) & (place < start + extent), 3 - axis)
    # One image of noise for the batch, as in timm's RandomErasingMasked: noise for every pixel of a thousand images
    # would take longer than all the rest, and each image has its rectangle in another place.
    return jnp.where(inside[..., None], jax.random.normal(keys[5], inputs.shape[1:], inputs.dtype), inputs)
