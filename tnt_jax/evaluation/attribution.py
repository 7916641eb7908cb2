"""Attribution: the part of a class's logit that each sentence, word or pixel of an image has.

Every method gives float32 maps, a number for each place. Those of attention exist at the size of sentences and of
words: how much a patch matters is what the outer transformer says, how that is divided among its words is what the
inner one says, so the words of a patch add up to the patch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tnt_jax.config import InputError
from tnt_jax.evaluation.capture import Observed, observe
from tnt_jax.models.pyramid_tnt import SPATIAL_REDUCTION, key_grid, stage_grids
from tnt_jax.models.tnt import grid_size, map_of_words, words_per_side
from tnt_jax.models.variants import Model, with_formulation

Images = Float[Array | np.ndarray, "batch height width channels"]
Classes = Int[Array | np.ndarray, " batch"]
Maps = Float[np.ndarray, "batch rows columns"]
Size = Literal["sentences", "words", "pixels"]
EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class Place:
    """A block's place in the network."""

    grid: tuple[int, int]
    """Rows and columns of its sentences."""
    keys: tuple[int, int]
    """Rows and columns of its keys."""
    reduction: int
    """Sentences along a side of a key."""
    scale: int
    """Patches along a side of one of its sentences: 1, and 2, 4, 8 in later stages of a PyramidTNT."""


def places_of(model: Model) -> list[Place]:
    """The place of every block."""
    config = model.config
    if config.architecture != "pyramid":
        grid = grid_size(config)
        return [Place(grid, grid, 1, 1)] * config.depth
    return [
        Place(grid, key_grid(grid, reduction), reduction, 2**stage)
        for stage, (grid, reduction, depth) in enumerate(
            zip(stage_grids(config), SPATIAL_REDUCTION, config.depth, strict=True)
        )
        for _ in range(depth)
    ]


def shape_of(model: Model, size: Size) -> tuple[int, int]:
    """Rows and columns of a map over the image."""
    in_patch = {"sentences": 1, "words": words_per_side(model.config), "pixels": model.config.patch_size}[size]
    rows, columns = grid_size(model.config)
    return rows * in_patch, columns * in_patch


def attribute(
    model: Model, images: Images, classes: Classes, method: str = "rollout", *, size: Size = "words", **options
) -> Maps:
    """The attribution of a class's logit to each place of an image, for a batch of normalised images.

    Args:
        classes: the class that is explained, of every image.
        method: one of `METHODS`.
        size: of a place: "sentences" (patches), "words", or "pixels", which the methods of pixels alone have.
        options: of the method: `block` of grad-cam, `steps` of integrated-gradients.

    Returns:
        (batch, rows, columns), with a TNT-S of 224 pixels 14 x 14 sentences, 56 x 56 words or 224 x 224 pixels.
        integrated-gradients is signed; the others are at least 0.

    Raises:
        InputError: an unknown method, a size that it does not have, a class that the model does not have.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if size not in METHODS[method].sizes:
        raise InputError(f"{method} has no map of {size}; it has {' and '.join(METHODS[method].sizes)}")
    if unknown := [name for name in options if name not in METHODS[method].options]:
        has = f"it has {', '.join(METHODS[method].options)}" if METHODS[method].options else "it has none"
        raise InputError(f"{method} has no option {unknown[0]!r}; {has}")
    count = model.config.num_classes
    classes = np.asarray(classes)
    if outside := [int(each) for each in classes if not 0 <= each < count]:
        raise InputError(f"there is no class {outside[0]}; the model has {count} classes, counted from 0")
    # What attends to what is seen in the equations alone; a gradient by the input is the same in every formulation.
    formulation = model.config.inner if METHODS[method].sizes == OF_PIXELS else "reference"
    exact = with_formulation(model, formulation, dtype="float32")
    maps = METHODS[method].compute(exact, jnp.asarray(images, jnp.float32), jnp.asarray(classes), size, **options)
    return np.asarray(maps, np.float32)


def input_gradient(model: Model, images: Images, classes: Classes) -> Float[np.ndarray, "batch height width channels"]:
    """The gradient of the logit of a class by the normalised pixels of each image, by the model's own formulation."""
    return np.asarray(_input_gradient(*nnx.split(model), jnp.asarray(images, jnp.float32), jnp.asarray(classes)))


@functools.partial(jax.jit, static_argnums=0)
def _input_gradient(graph: nnx.GraphDef, state: nnx.State, images: Array, classes: Array) -> Array:
    def score(images: Array) -> Array:
        return _of_class(nnx.merge(graph, state)(images), classes)

    with jax.default_matmul_precision("highest"):
        return jax.grad(score)(images)


def _of_class(logits: Float[Array, "batch classes"], classes: Int[Array, " batch"]) -> Float[Array, ""]:
    """The sum over the images of the logits of their classes."""
    return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()


# Methods of attention and activations ----------------------------------------------------------------------------


def grad_cam(model: Model, images: Array, classes: Array, size: Size, *, block: int | None = None) -> Array:
    """Grad-CAM: the channels of a block's sentences (or words), weighted by their mean gradients; negative sums are 0.

    Args:
        block: counted from 0. By default the last whose patches reach the class: of a TNT the one before the last,
            since after the last block only the class token is read; for words the last with an inner transformer.

    Source: Selvaraju et al., arXiv 1610.02391, equations 1 and 2.
    """
    places, prefix = places_of(model), model.num_prefix_tokens
    possible = list(model.config.inner_blocks) if size == "words" else list(range(len(places) - (prefix > 0)))
    if not possible:
        raise InputError(f"no block of this model has {'an inner transformer' if size == 'words' else 'a next one'}")
    block = possible[-1] if block is None else block
    if block not in possible:
        what = "no inner transformer" if size == "words" else "no patches that reach the class"
        raise InputError(f"block {block} has {what}; the blocks that do are {', '.join(map(str, possible))}")
    values, gradients = _observe(model, images, classes)
    place, batch = places[block], len(images)
    if size == "words":
        value, gradient = values[block].words, gradients[block].words
        weights = gradient.mean(axis=(1, 2), keepdims=True)
        return _tiled(jax.nn.relu((weights * value).sum(-1)), place.grid)
    # The class token lies nowhere in the image.
    value, gradient = values[block].sentences[:, prefix:], gradients[block].sentences[:, prefix:]
    weights = gradient.mean(axis=1, keepdims=True)
    return jax.nn.relu((weights * value).sum(-1)).reshape(batch, *place.grid)


def rollout(model: Model, images: Array, classes: Array, size: Size) -> Array:
    """Gradient-weighted attention rollout: attention counts where more of it would raise the logit of the class.

    In every block the heads' attention times its gradient, without what is negative, is averaged to A, and relevance
    grows by A R. Between the stages of a PyramidTNT a sentence hands its relevance to the four that it was made of.
    Words: their own rollout inside every patch, from what each block's words add to the sentence.
    Source: Chefer et al., arXiv 2103.15679, equations 5 and 6.
    """
    values, gradients = _observe(model, images, classes)
    flows = [
        jax.nn.relu(gradient.outer * value.outer).mean(axis=1)
        for value, gradient in zip(values, gradients, strict=True)
    ]
    places = places_of(model)
    sentences = _rolled_back(flows, places, model.num_prefix_tokens)
    if size == "sentences":
        return sentences
    words, relevance, stage = 0.0, None, None
    for index, (value, gradient, place) in enumerate(zip(values, gradients, places, strict=True)):
        if value.inner is None:
            continue
        flow = jax.nn.relu(gradient.inner * value.inner).mean(axis=2)
        if stage != place.scale:
            relevance, stage = jnp.eye(flow.shape[-1]), place.scale
        relevance = relevance + flow @ relevance
        added = jax.nn.relu((gradients[index].projected * value.projected).sum(-1))
        words += _on_words(model, jnp.einsum("bpw,bpwv->bpv", added, _per_patch(relevance, flow)), place)
    return _divided(sentences, words)


def _observe(model: Model, images: Array, classes: Array) -> tuple[list[Observed], list[Observed]]:
    return observe(*nnx.split(model), images, classes)


def _per_patch(relevance: Array, flow: Array) -> Array:
    """Relevance of the words of every patch, (batch, patches, words, words)."""
    return jnp.broadcast_to(relevance, flow.shape)


def _rolled_back(flows: Sequence[Array], places: Sequence[Place], prefix: int) -> Array:
    """The relevance of every patch for what the head reads, from the last block back to the first.

    Row by row it is the product of (1 + A) over the blocks. Followed backwards from the head it costs a vector.
    """
    batch, tokens = flows[-1].shape[:2]
    relevance = jnp.zeros((batch, tokens)).at[:, 0].set(1) if prefix else jnp.full((batch, tokens), 1 / tokens)
    following = places[-1]
    for flow, place in zip(reversed(flows), reversed(places), strict=True):
        if place.scale != following.scale:
            maps = _upsampled(relevance.reshape(batch, *following.grid), 2, place.grid) / 4
            relevance, following = maps.reshape(batch, -1), place
        to_keys = jnp.einsum("bq,bqk->bk", relevance, flow)
        relevance = relevance + (to_keys if prefix else _over_squares(to_keys, place).reshape(batch, -1))
    return relevance[:, prefix:].reshape(batch, *places[0].grid)


def _over_squares(of_keys: Array, place: Place) -> Array:
    """Values of keys, divided among the sentences that each key is the mean of: (batch, rows, columns)."""
    maps = of_keys.reshape(len(of_keys), *place.keys) / place.reduction**2
    return _upsampled(maps, place.reduction, place.grid)


def _upsampled(maps: Array, times: int, size: tuple[int, int]) -> Array:
    """Each number `times` by `times` times; cut or filled with zeros to the size."""
    maps = maps.repeat(times, 1).repeat(times, 2)[:, : size[0], : size[1]]
    return jnp.pad(maps, ((0, 0), (0, size[0] - maps.shape[1]), (0, size[1] - maps.shape[2])))


def _on_patches(model: Model, maps: Array, place: Place) -> Array:
    """A map over the sentences of a block as one over the patches of the image, with the same sum."""
    return _upsampled(maps, place.scale, grid_size(model.config)) / place.scale**2


def _on_words(model: Model, words: Array, place: Place) -> Array:
    """Numbers for the words of a block, (batch, patches, words), as a map over the words of the first blocks."""
    maps, side = _tiled(words, place.grid), math.isqrt(words.shape[-1])
    size = tuple(count * side for count in grid_size(model.config))
    return _upsampled(maps, place.scale, size) / place.scale**2


def _tiled(words: Array, grid: tuple[int, int]) -> Array:
    """(batch, patches, words) as the words lie in the image."""
    return map_of_words(words.reshape(len(words), *grid, -1, 1))[..., 0]


def _divided(sentences: Array, words: Array) -> Array:
    """The relevance of every patch, divided among its words in proportion to theirs; evenly where they have none."""
    batch, rows, columns = sentences.shape
    side = words.shape[1] // rows
    parts = words.reshape(batch, rows, side, columns, side)
    total = parts.sum(axis=(2, 4), keepdims=True)
    shares = jnp.where(total > EPSILON, parts / jnp.maximum(total, EPSILON), 1 / side**2)
    return (shares * sentences[:, :, None, :, None]).reshape(words.shape)


# Methods of pixels -------------------------------------------------------------------------------------------------


def integrated_gradients(model: Model, images: Array, classes: Array, size: Size, *, steps: int = 32) -> Array:
    """Integrated gradients from the mean colour, which is 0 once normalised, to the image; summed over channels.

    The map adds up to the difference of the two logits, as far as `steps` points of a Gauss-Legendre rule tell.
    Source: Sundararajan et al., arXiv 1703.01365, equation 1.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}, and must be at least 1")
    points, weights = np.polynomial.legendre.leggauss(steps)
    factors = jnp.asarray((points + 1) / 2, jnp.float32)
    gradient = _mean_gradient(*nnx.split(model), images, classes, factors, jnp.asarray(weights / 2, jnp.float32))
    return _by_size(model, (gradient * images).sum(-1), size)


@functools.partial(jax.jit, static_argnums=0)
def _mean_gradient(
    graph: nnx.GraphDef, state: nnx.State, images: Array, classes: Array, factors: Array, weights: Array
) -> Array:
    """The weighted mean of gradients by the input, at multiples of the images."""
    # Several points at a time, as far as that makes no batch larger than 8; the last ones are filled up without weight.
    together = min(max(1, 8 // len(images)), len(factors))
    filled = -len(factors) % together
    factors, weights = (jnp.pad(each, (0, filled)).reshape(-1, together) for each in (factors, weights))
    repeated = jnp.tile(classes, together)

    def score(images: Array) -> Array:
        return _of_class(nnx.merge(graph, state)(images), repeated)

    def add(total: Array, several: tuple) -> tuple[Array, None]:
        points = several[0][:, None, None, None, None] * images
        gradients = jax.grad(score)(points.reshape(-1, *images.shape[1:])).reshape(points.shape)
        return total + jnp.tensordot(several[1], gradients, 1), None

    with jax.default_matmul_precision("highest"):
        return jax.lax.scan(add, jnp.zeros_like(images), (factors, weights))[0]


def _by_size(model: Model, pixels: Array, size: Size) -> Array:
    """Pixels added up to words or sentences."""
    (rows, columns), (batch, height, width) = shape_of(model, size), pixels.shape
    return pixels.reshape(batch, rows, height // rows, columns, width // columns).sum(axis=(2, 4))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of saying why."""

    compute: Callable[..., Array]
    sizes: tuple[Size, ...]
    """Of the places that it has maps of, the finest last."""
    title: str
    options: tuple[str, ...] = ()


OF_ATTENTION, OF_PIXELS = ("sentences", "words"), ("sentences", "words", "pixels")
METHODS = {
    "rollout": Method(rollout, OF_ATTENTION, "gradient-weighted rollout"),
    "grad-cam": Method(grad_cam, OF_ATTENTION, "Grad-CAM", ("block",)),
    "integrated-gradients": Method(integrated_gradients, OF_PIXELS, "integrated gradients", ("steps",)),
}
