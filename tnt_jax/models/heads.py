"""Networks that give logits of every pixel, or boxes: TNT and PyramidTNT with a head over their maps.

`linear` is Segmenter's (arXiv 2105.05633): the classes of a patch from its last sentence, one linear map.
`mlp` is SegFormer's (arXiv 2105.15203): four maps, each brought to one width and to the size of the finest, fused by a
linear map with batch norm. Of a TNT they are the blocks 3, 6, 9 and 12 through `FeaturePyramid`, of a PyramidTNT its
four stages. `mlp_words` adds the words of the last block of a TNT to them, which no other network has.
Either's last map is the model's `head`, as that of a classifier is; logits are brought to the size of the image,
bilinear.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models import detectors
from tnt_jax.models.calling import Images, explains_forward_mode, training_key
from tnt_jax.models.features import FeaturePyramid
from tnt_jax.models.functions import Keys, dropout, split_key
from tnt_jax.models.layers import BatchNorm, LayerNorm, Linear, Rngs
from tnt_jax.models.pyramid_tnt import PyramidTNT, stage_grids
from tnt_jax.models.tnt import TNT, grid_size, make_head, map_of_words, words_per_side

DECODER_DIM = 256
"""Channels of the fused map at most, as of SegFormer-B0 and B1; a narrower network has its own width."""
Maps = Float[Array, "batch _rows _columns _channels"]
MLPS = ("mlp", "mlp_words")


def resized(
    maps: Float[Array, "batch rows columns channels"], size: tuple[int, int]
) -> Float[Array, "batch height width channels"]:
    """Bilinear, as PyTorch's `interpolate(mode="bilinear", align_corners=False)` enlarges.

    Two matrix products, as `jax.image.resize` computes it too, which cannot be exported for any number of images.
    """
    if maps.shape[1:3] == size:
        return maps
    rows, columns = (
        jnp.asarray(bilinear(length, to), maps.dtype) for length, to in zip(maps.shape[1:3], size, strict=True)
    )
    # Channels stand before the places in between: of the gradient in any other order XLA for GPUs (JAX 0.10.2) says
    # that it finds no tiles.
    maps = jnp.einsum("bhwc,xw->bchx", maps, columns, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("bchx,yh->byxc", maps, rows, precision=jax.lax.Precision.HIGHEST)


def bilinear(length: int, to: int) -> Float[np.ndarray, "to length"]:
    """Shares of the old places in each new one."""
    places = ((np.arange(to) + 0.5) * length / to - 0.5).clip(0, length - 1)
    return np.maximum(0, 1 - abs(places[:, None] - np.arange(length))).astype(np.float32)


def map_dims(config: ModelConfig) -> tuple[int, ...]:
    """Channels of the four maps, the finest first."""
    return config.outer_dim if config.architecture == "pyramid" else (config.outer_dim,) * 4


def decoder_dim(config: ModelConfig) -> int:
    """Channels of what the last map of the head takes."""
    return min(DECODER_DIM, map_dims(config)[-1]) if config.head in MLPS else map_dims(config)[-1]


def map_blocks(config: ModelConfig) -> tuple[int, ...]:
    """The blocks whose maps are taken, counted from 0: the last of each stage, or of each quarter of a TNT."""
    if config.architecture == "pyramid":
        return tuple(int(end) - 1 for end in np.cumsum(config.depth))
    return tuple(-(-config.depth * quarter // 4) - 1 for quarter in range(1, 5))


def check_head(config: ModelConfig) -> None:
    """Raises InputError for a head that the network cannot have."""
    detectors.check_detector(config)
    if config.head_drop_rate and config.head not in (*MLPS, *detectors.DETRS):
        raise InputError(
            f"head_drop_rate is {config.head_drop_rate:g}, and head {config.head} has no dropout: leave it at 0; "
            "drop_rate is that of the blocks"
        )
    if config.head == "linear" and config.architecture == "pyramid":
        raise InputError(
            "head is linear, which gives the classes of a patch from its last sentence: a PyramidTNT has one for 64 x "
            "64 pixels; take head mlp"
        )
    if config.head == "mlp_words" and config.architecture == "pyramid":
        raise InputError("head mlp_words reads the words of a TNT's last block; a PyramidTNT has few there: take mlp")


class MlpDecoder(nnx.Module):
    """Four maps to one (SegFormer's decode head without its last map, transformers' `SegformerDecodeHead`)."""

    def __init__(self, dims: Sequence[int], dim: int, *, config: ModelConfig, rngs: Rngs):
        self.drop_rate = config.head_drop_rate
        self.linears = nnx.List([Linear(each, dim, config=config, rngs=rngs) for each in dims])
        self.fuse = Linear(4 * dim, dim, use_bias=False, config=config, rngs=rngs)
        self.norm = BatchNorm(dim, config=config, rngs=rngs)

    def __call__(self, maps: Sequence[Maps], key: Keys | None = None, detail: Maps | None = None) -> Maps:
        """With a key batch norm trains; `detail` is added to what is fused of the maps."""
        size = maps[0].shape[1:3]
        wide = [resized(linear(each), size) for linear, each in zip(self.linears, maps, strict=True)]
        fused = self.fuse(jnp.concatenate(wide[::-1], axis=-1))
        if detail is not None:
            fused = fused + resized(detail, size)
        return dropout(nnx.relu(self.norm(fused, training=key is not None)), self.drop_rate, key)


class Decoder(nnx.Module):
    """The layers between the maps of the blocks and the last map of the head `mlp`.

    SegFormer's stages end with a norm, and those of TNT and PyramidTNT do not: each map has one here, the last one the
    model's own.
    """

    def __init__(self, dims: Sequence[int], *, config: ModelConfig, rngs: Rngs):
        self.norms = nnx.List([LayerNorm(dim, config=config, rngs=rngs) for dim in dims[:-1]])
        self.pyramid = None if config.architecture == "pyramid" else FeaturePyramid(config, rngs=rngs)
        self.mlp = MlpDecoder(dims, decoder_dim(config), config=config, rngs=rngs)

    def __call__(
        self, maps: Sequence[Maps], last: LayerNorm, key: Keys | None = None, detail: Maps | None = None
    ) -> Maps:
        maps = [norm(each) for norm, each in zip([*self.norms, last], maps, strict=True)]
        return self.mlp(maps if self.pyramid is None else self.pyramid(maps, key), key, detail)


class WordDecoder(Decoder):
    """`Decoder` with the words of the last block, normalised, through a linear map of their own."""

    def __init__(self, dims: Sequence[int], *, config: ModelConfig, rngs: Rngs):
        super().__init__(dims, config=config, rngs=rngs)
        self.word_norm = LayerNorm(config.inner_dim, config=config, rngs=rngs)
        self.word_linear = Linear(config.inner_dim, decoder_dim(config), use_bias=False, config=config, rngs=rngs)

    def __call__(self, maps: Sequence[tuple[Maps, Array]], last: LayerNorm, key: Keys | None = None) -> Maps:
        """`maps` are pairs, of `forward_intermediates(words=True)`."""
        detail = self.word_linear(self.word_norm(map_of_words(maps[-1][1])))
        return super().__call__([each for each, _ in maps], last, key, detail)


DETECTORS = ("retinanet", "detr", "detr_unpooled")
DECODERS = {
    "mlp": Decoder,
    "mlp_words": WordDecoder,
    "retinanet": detectors.RetinaNet,
    "detr": detectors.Detr,
    "detr_unpooled": detectors.Detr,
}


class Identity(nnx.Module):
    """The norm of a network that has none."""

    def __call__(self, tokens: Array) -> Array:
        return tokens


class _Dense:
    """The parts that both networks have in common: a mixin before TNT or PyramidTNT."""

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        super().__init__(config, rngs=rngs)
        decoder = DECODERS.get(config.head)
        self.decoder = decoder and decoder(map_dims(config), config=config, rngs=rngs)
        self.head = None if config.head in DETECTORS else make_head(decoder_dim(config), config=config, rngs=rngs)
        if config.head == "detr_unpooled":
            self.norm = Identity()

    @explains_forward_mode
    def __call__(
        self, images: Images, key: Keys | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch height width classes"] | Float[Array, "batch *boxes outputs"]:
        """Logits of every pixel in float32; with `num_classes=0` the map that the head would take. Of a detector what
        `tnt_jax.models.detectors` says."""
        key = training_key(self, key, rngs)
        if self.decoder is None:
            tokens = self.forward_features(images, key)[:, -int(np.prod(grid_size(self.config))) :]
            found = tokens.reshape(tokens.shape[0], *grid_size(self.config), -1)
        else:
            blocks_key, decoder_key = split_key(key, 2)
            blocks = map_blocks(self.config)
            found = self.forward_intermediates(images, blocks, words=self.config.head == "mlp_words", key=blocks_key)
            of_block = dict(zip(sorted(set(blocks)), found, strict=True))
            found = self.decoder([of_block[block] for block in blocks], self.norm, decoder_key)
        found = found.astype(jnp.float32)
        if self.config.head in DETECTORS:
            return found
        return found if self.head is None else resized(self.head(found), self.config.image_size)


class DenseTNT(_Dense, TNT):
    """A TNT that gives logits of every pixel."""


class DensePyramidTNT(_Dense, PyramidTNT):
    """A PyramidTNT that gives logits of every pixel."""


class OfClasses(NamedTuple):
    """The linear map or convolution whose outputs are those of the classes."""

    path: str = "head"
    groups: int = 1
    """Of outputs, each with all classes."""
    others: int = 0
    """Outputs behind the classes of each group."""


OF_CLASSES = {
    "retinanet": OfClasses("decoder.classes.last", detectors.ANCHORS),
    "detr": OfClasses("decoder.classes", others=1),
    "detr_unpooled": OfClasses("decoder.classes", others=1),
}
LAST_LAYERS = {part.path for part in (OfClasses(), *OF_CLASSES.values())} | {"decoder.boxes.last", "decoder.boxes.2"}
"""Of any network: what gives the classes, of a detector the boxes too."""


def of_classes(config: ModelConfig) -> OfClasses:
    """The part of a model that gives its classes."""
    return OF_CLASSES.get(config.head, OfClasses())


def count_classes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of classes that a model's parameters have, whose shapes are given by path; 0 without a head."""
    part = of_classes(config)
    shape = shapes.get(f"{part.path}.bias", ())
    return max(0, shape[0] // part.groups - part.others) if len(shape) == 1 else 0


def head_macs(config: ModelConfig) -> int:
    """Multiply-accumulates of an image behind the blocks, as `count_macs` counts."""
    if config.head in DETECTORS:
        return detectors.detector_macs(config)
    if config.head == "class":
        return map_dims(config)[-1] * config.num_classes
    rows, columns = grid_size(config)
    if config.head == "linear":
        return rows * columns * map_dims(config)[-1] * config.num_classes
    dims, dim = map_dims(config), decoder_dim(config)
    if config.architecture == "pyramid":
        places, pyramid = [height * width for height, width in stage_grids(config)], 0
    else:
        places = [16 * rows * columns, 4 * rows * columns, rows * columns, -(-rows // 2) * -(-columns // 2)]
        # Of the transposed convolutions 1 + 4 and 1 times the grid, of the 3x3 convolution nine times a quarter of it.
        pyramid = dims[0] ** 2 * (4 * (1 + 4 + 1) * rows * columns + 9 * places[3])
    linears = sum(count * each * dim for count, each in zip(places, dims, strict=True))
    if config.head == "mlp_words":
        linears += rows * columns * words_per_side(config) ** 2 * config.inner_dim * dim
    return pyramid + linears + places[0] * (4 * dim * dim + dim * config.num_classes)
