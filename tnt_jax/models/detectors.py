"""Networks that find boxes: RetinaNet's head over maps of five scales, and DETR's transformers over the last sentences.

What they give says itself what it means: of `retinanet` (batch, anchors, classes + 8), logits of the classes, the
encoded box and the anchor that it is encoded by; of `detr` (batch, layers, queries, classes + 5), logits of the classes
and of none, and the box by its centre, width and height. Boxes are shares of the image. In training DETR gives what
every layer of its decoder says, else the last one's.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.features import FeaturePyramid
from tnt_jax.models.functions import Keys, dropout, split_key
from tnt_jax.models.layers import LayerNorm, Linear, Rngs, initializer
from tnt_jax.models.pyramid_tnt import stage_grids
from tnt_jax.models.tnt import grid_size

DIM = 256
"""Channels of a head at most; a narrower network has its own width."""
LEVELS, CONVS = 5, 4
ASPECTS, SCALES = (0.5, 1.0, 2.0), (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
ANCHORS = len(ASPECTS) * len(SCALES)
"""At each place."""
ANCHOR_SIZE = 4
"""In strides of the level (arXiv 1708.02002, section 4)."""
PRIOR = 0.01
"""The chance of a class before anything was learned."""
LAYERS, QUERIES, HEAD_DIM, MLP_RATIO = 6, 100, 32, 8
"""Of DETR (arXiv 2005.12872); 256 channels have 8 heads and 2048 between the linear maps."""
DETRS = ("detr", "detr_unpooled")
Maps = Float[Array, "batch rows columns channels"]


def head_dim(config: ModelConfig) -> int:
    """Channels of the head."""
    return min(DIM, int(np.ravel(config.outer_dim)[-1]))


def check_detector(config: ModelConfig) -> None:
    """Raises InputError for a head that the network cannot have."""
    if config.head not in DETRS:
        return
    if config.architecture == "pyramid":
        raise InputError(
            f"head {config.head} reads the sentences of a TNT; a PyramidTNT has maps of four scales: take retinanet"
        )
    if head_dim(config) % HEAD_DIM:
        raise InputError(f"head {config.head} has heads of {HEAD_DIM} channels, and outer_dim is {config.outer_dim}")


def conv(
    inputs: int, outputs: int, size: int, *, stride: int = 1, std: float = 0.0, bias: float = 0.0, config, rngs: Rngs
) -> nnx.Conv:
    """A convolution with a border of zeros, initialised as in torchvision: a normal distribution, or where `std` is 0
    uniform by the fan in."""
    bound = (3 / (inputs * size * size)) ** 0.5
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,
        kernel_init=initializer(
            lambda rng, shape: (
                std * rng.standard_normal(shape, np.float32)
                if std
                else rng.uniform(-bound, bound, shape).astype(np.float32)
            )
        ),
        bias_init=initializer(lambda rng, shape: np.full(shape, bias, np.float32)),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def anchors_of(shapes: Sequence[tuple[int, int]], image_size: tuple[int, int]) -> Float[np.ndarray, "anchors 4"]:
    """The anchors of maps of these shapes, place by place, aspect by aspect, as torchvision has them.

    Their sides are whole pixels, and the first of a map has its middle in the corner of the image.
    """
    found = []
    for rows, columns in shapes:
        strides = [side // count for side, count in zip(image_size, (rows, columns), strict=True)]
        sizes = np.array([int(ANCHOR_SIZE * max(strides) * scale) for scale in SCALES], np.float32)
        high = np.sqrt(np.array(ASPECTS, np.float32))
        heights, widths = (np.outer(side, sizes).ravel() for side in (high, 1 / high))
        around = np.round(np.stack([-widths, -heights, widths, heights], axis=1) / 2)
        down, right = np.mgrid[:rows, :columns].reshape(2, -1) * np.array(strides)[:, None]
        found.append((np.stack([right, down, right, down], axis=1)[:, None] + around).reshape(-1, 4))
    return (np.concatenate(found) / np.array([*image_size[::-1]] * 2)).astype(np.float32)


class Tower(nnx.Module):
    """`CONVS` convolutions and a last one, over every map (RetinaNet's subnets)."""

    def __init__(self, dim: int, outputs: int, *, bias: float, config: ModelConfig, rngs: Rngs):
        make = functools.partial(conv, dim, size=3, std=0.01, config=config, rngs=rngs)
        self.convs = nnx.List([make(dim) for _ in range(CONVS)])
        self.last = make(outputs, bias=bias)

    def __call__(self, maps: Maps) -> Float[Array, "batch rows columns outputs"]:
        for each in self.convs:
            maps = nnx.relu(each(maps))
        return self.last(maps)


class RetinaNet(nnx.Module):
    """Maps of a network to classes and boxes of anchors (arXiv 1708.02002), over a feature pyramid (arXiv 1612.03144).

    Of a TNT, the maps are what `FeaturePyramid` makes of its blocks 3, 6, 9 and 12 but for the finest, as in table 13
    of the paper; of a PyramidTNT its four stages. Coarser ones are made of the last until there are `LEVELS`: of images
    with patches of 16 strides of 8 to 128, of a PyramidTNT too.
    """

    def __init__(self, dims: Sequence[int], *, config: ModelConfig, rngs: Rngs):
        self.image_size, self.num_classes = config.image_size, config.num_classes
        dim = head_dim(config)
        make = functools.partial(conv, config=config, rngs=rngs)
        self.norms = nnx.List([LayerNorm(each, config=config, rngs=rngs) for each in dims[:-1]])
        self.pyramid = None if config.architecture == "pyramid" else FeaturePyramid(config, rngs=rngs)
        dims = dims if self.pyramid is None else dims[1:]
        self.lateral = nnx.List([make(each, dim, 1) for each in dims])
        self.smooth = nnx.List([make(dim, dim, 3) for _ in dims])
        self.coarser = nnx.List([make(dim, dim, 3, stride=2) for _ in range(LEVELS - len(dims))])
        prior = -math.log((1 - PRIOR) / PRIOR)
        self.classes = Tower(dim, ANCHORS * config.num_classes, bias=prior, config=config, rngs=rngs)
        self.boxes = Tower(dim, ANCHORS * 4, bias=0.0, config=config, rngs=rngs)

    def __call__(
        self, maps: Sequence[Maps], last: LayerNorm, key: Keys | None = None
    ) -> Float[Array, "batch anchors outputs"]:
        maps = [norm(each) for norm, each in zip([*self.norms, last], maps, strict=True)]
        return self.over_levels(self.levels(maps if self.pyramid is None else self.pyramid(maps, key)[1:]))

    def levels(self, maps: Sequence[Maps]) -> list[Maps]:
        """The feature pyramid: each map with the coarser ones added, and what is coarser than all."""
        wide = [lateral(each) for lateral, each in zip(self.lateral, maps, strict=True)]
        for index in reversed(range(len(wide) - 1)):
            # Every place twice; of an uneven side the last one once, as PyTorch's nearest neighbours are.
            twice = wide[index + 1].repeat(2, axis=1).repeat(2, axis=2)
            wide[index] += twice[:, : wide[index].shape[1], : wide[index].shape[2]]
        found = [smooth(each) for smooth, each in zip(self.smooth, wide, strict=True)]
        for index, each in enumerate(self.coarser):
            found.append(each(nnx.relu(found[-1]) if index else found[-1]))
        return found

    def over_levels(self, levels: Sequence[Maps]) -> Float[Array, "batch anchors outputs"]:
        """Both towers on every level, with the anchors."""
        batch, sizes = levels[0].shape[0], (self.num_classes, 4)
        found = [
            jnp.concatenate([tower(each).reshape(batch, -1, size) for each in levels], axis=1).astype(jnp.float32)
            for tower, size in zip((self.classes, self.boxes), sizes, strict=True)
        ]
        anchors = jnp.asarray(anchors_of([each.shape[1:3] for each in levels], self.image_size))
        return jnp.concatenate([*found, jnp.broadcast_to(anchors, (batch, *anchors.shape))], axis=-1)


def uniform(fan: Callable[[int, int], float]) -> Callable:
    """An initialiser: uniform, at most the root of one over `fan` of inputs and outputs."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        bound = fan(*shape) ** -0.5
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return initializer(draw)


# As DETR's authors begin: Xavier's in its transformers, where queries, keys and values are one matrix, PyTorch's around
# them.
OF_ATTENTION = uniform(lambda inputs, outputs: (inputs + 3 * outputs) / 6)
OF_TRANSFORMER = uniform(lambda inputs, outputs: (inputs + outputs) / 6)
OF_LINEAR = uniform(lambda inputs, outputs: inputs)


def sine_positions(rows: int, columns: int, dim: int) -> Float[np.ndarray, "places dim"]:
    """DETR's positions: sine and cosine of the row in the first half of the channels, of the column in the other."""
    half = dim // 2
    rates = 10000 ** (2 * (np.arange(half) // 2) / half)
    found = []
    for axis, count in enumerate((rows, columns)):
        place = (np.mgrid[:rows, :columns][axis].ravel() + 1) / (count + 1e-6) * 2 * np.pi
        angles = place[:, None] / rates
        found.append(np.where(np.arange(half) % 2, np.cos(angles), np.sin(angles)))
    return np.concatenate(found, axis=1).astype(np.float32)


class CrossAttention(nnx.Module):
    """Multi-head attention whose queries, keys and values are different tokens, each with a bias."""

    def __init__(self, dim: int, *, config: ModelConfig, rngs: Rngs):
        make = functools.partial(Linear, dim, dim, config=config, rngs=rngs)
        self.num_heads, self.drop_rate = dim // HEAD_DIM, config.head_drop_rate
        self.q, self.k, self.v = (make(kernel_init=OF_ATTENTION) for _ in range(3))
        self.proj = make(kernel_init=OF_TRANSFORMER)

    def __call__(self, queries: Array, keys: Array, values: Array, key: Keys | None = None) -> Array:
        q, k, v = (
            linear(tokens).reshape(*tokens.shape[:2], self.num_heads, -1)
            for linear, tokens in ((self.q, queries), (self.k, keys), (self.v, values))
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
        weights = dropout(jax.nn.softmax(logits), self.drop_rate, key).astype(v.dtype)
        return self.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*queries.shape[:2], -1))


class EncoderLayer(nnx.Module):
    """Attention and MLP with norms behind them, as of the first transformer; positions are added to queries and keys.
    A layer of the decoder attends to the encoder's tokens in between."""

    def __init__(self, dim: int, *, has_cross: bool = False, config: ModelConfig, rngs: Rngs):
        norm, attention = (
            functools.partial(each, dim, config=config, rngs=rngs) for each in (LayerNorm, CrossAttention)
        )
        self.attn, self.norm1, self.drop_rate = attention(), norm(), config.head_drop_rate
        self.cross, self.norm2 = (attention(), norm()) if has_cross else (None, None)
        make = functools.partial(Linear, kernel_init=OF_TRANSFORMER, config=config, rngs=rngs)
        self.fc1, self.fc2 = make(dim, MLP_RATIO * dim), make(MLP_RATIO * dim, dim)
        self.norm3 = norm()

    def __call__(
        self, x: Array, positions: Array, key: Keys | None, memory: Array | None = None, places: Array | None = None
    ) -> Array:
        keys = split_key(key, 6)
        own = x + positions
        x = self.norm1(x + dropout(self.attn(own, own, x, keys[0]), self.drop_rate, keys[1]))
        if self.cross is not None:
            found = self.cross(x + positions, memory + places, memory, keys[2])
            x = self.norm2(x + dropout(found, self.drop_rate, keys[3]))
        hidden = dropout(nnx.relu(self.fc1(x)), self.drop_rate, keys[4])
        return self.norm3(x + dropout(self.fc2(hidden), self.drop_rate, keys[5]))


class Detr(nnx.Module):
    """Sentences of a TNT to classes and boxes of queries (DETR), with a mean over 2 x 2 sentences before it, as the
    paper has it (table 10), unless the head is `detr_unpooled`."""

    def __init__(self, dims: Sequence[int], *, config: ModelConfig, rngs: Rngs):
        self.pools, dim = config.head == "detr", head_dim(config)
        make = functools.partial(EncoderLayer, config=config, rngs=rngs)
        linear = functools.partial(Linear, kernel_init=OF_LINEAR, config=config, rngs=rngs)
        self.projection = linear(dims[-1], dim)
        self.encoder = nnx.List([make(dim) for _ in range(LAYERS)])
        self.queries = nnx.Param(
            initializer(lambda rng, shape: rng.standard_normal(shape, np.float32))(
                rngs.params(), (QUERIES, dim), jnp.dtype(config.param_dtype)
            )
        )
        self.decoder = nnx.List([make(dim, has_cross=True) for _ in range(LAYERS)])
        self.norm = LayerNorm(dim, config=config, rngs=rngs)
        self.classes = linear(dim, config.num_classes + 1)
        self.boxes = nnx.List([linear(dim, dim), linear(dim, dim), linear(dim, 4)])

    def __call__(
        self, maps: Sequence[Maps], last: LayerNorm, key: Keys | None = None
    ) -> Float[Array, "batch layers queries outputs"]:
        maps = last(maps[-1])
        if not self.pools:
            return self.of_map(maps, key)
        _, rows, columns, dim = maps.shape
        down, right = min(2, rows), min(2, columns)
        maps = maps[:, : rows // down * down, : columns // right * right]
        squares = maps.reshape(-1, rows // down, down, columns // right, right, dim)
        return self.of_map(squares.mean(axis=(2, 4)), key)

    def of_map(self, maps: Maps, key: Keys | None = None) -> Float[Array, "batch layers queries outputs"]:
        """The transformers on a map. Without a key, of the last layer of the decoder alone."""
        batch, rows, columns, _ = maps.shape
        keys = split_key(key, 2 * LAYERS)
        memory = self.projection(maps.reshape(batch, rows * columns, -1))
        places = jnp.asarray(sine_positions(rows, columns, memory.shape[-1]), memory.dtype)
        for layer, each in zip(self.encoder, keys[:LAYERS], strict=True):
            memory = layer(memory, places, each)
        queries = self.queries[...].astype(memory.dtype)
        x, found = jnp.zeros((batch, *queries.shape), memory.dtype), []
        for layer, each in zip(self.decoder, keys[LAYERS:], strict=True):
            x = layer(x, queries, each, memory, places)
            found.append(self.norm(x))
        x = jnp.stack(found if key is not None else found[-1:], axis=1)
        boxes = x
        for index, linear in enumerate(self.boxes):
            boxes = linear(nnx.relu(boxes) if index else boxes)
        found = [self.classes(x).astype(jnp.float32), nnx.sigmoid(boxes.astype(jnp.float32))]
        return jnp.concatenate(found, axis=-1)


def detector_macs(config: ModelConfig) -> int:
    """Multiply-accumulates of an image behind the blocks, as `count_macs` counts: of linear maps and convolutions."""
    dim, (rows, columns) = head_dim(config), grid_size(config)
    if config.head in DETRS:
        places = max(1, rows // 2) * max(1, columns // 2) if config.head == "detr" else rows * columns
        of_layer = (4 + 2 * MLP_RATIO) * dim * dim
        encoder = LAYERS * (places * of_layer + 2 * places * places * dim)
        decoder = LAYERS * (
            QUERIES * (of_layer + 2 * dim * dim) + 2 * places * dim * dim + 2 * QUERIES * (QUERIES + places) * dim
        )
        last = QUERIES * dim * (2 * dim + 4 + config.num_classes + 1)
        return places * config.outer_dim * dim + encoder + decoder + last
    outputs, dims = ANCHORS * (config.num_classes + 4), np.ravel(config.outer_dim).tolist()
    if config.architecture == "pyramid":
        shapes, total = [list(shape) for shape in stage_grids(config)], 0
    else:
        shapes, dims = [[2 * rows, 2 * columns], [rows, columns], [-(-rows // 2), -(-columns // 2)]], dims * 3
        # Of the pyramid's transposed and its strided convolution.
        total = dims[0] ** 2 * (4 * rows * columns + 9 * math.prod(shapes[-1]))
    total += sum(math.prod(shape) * dim * (each + 9 * dim) for shape, each in zip(shapes, dims, strict=True))
    while len(shapes) < LEVELS:
        shapes.append([-(-side // 2) for side in shapes[-1]])
        total += math.prod(shapes[-1]) * 9 * dim * dim
    return total + sum(map(math.prod, shapes)) * 9 * dim * (2 * CONVS * dim + outputs)
