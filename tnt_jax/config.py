"""The whole of a run as frozen dataclasses.

A config file returns one `TrainConfig`, the command line changes its fields.
"""

import dataclasses
from typing import Literal


class InputError(ValueError):
    """Something the user gave is wrong.

    The message names the value and what would be right; commands print it and exit with 2.
    """


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model by its name, and what is to differ from it. A field that is None is as the name has it.

    `tnt_jax.models.variants.resolve` fills the fields that are None and checks all of them; the modules take a resolved
    one.
    Source of the sizes: table 1 of arXiv 2103.00112.
    """

    name: str = "tnt_s_patch16_224"
    """A name from `tnt_jax.list_models()`."""
    image_size: int | tuple[int, int] | None = None
    """Height and width of the input in pixels, each a multiple of the patch size; one number for a square."""
    in_channels: int | None = None
    """Channels of the input: 3 for colour, 1 for grey."""
    num_classes: int | None = None
    """Width of the output; 0 gives the normalised class token instead of logits."""
    architecture: Literal["official", "legacy"] | None = None
    """The two published networks: huawei's, or the one behind mmpretrain's and timm's first weights."""
    patch_size: int | None = None
    """Side of a patch (sentence) in pixels."""
    word_stride: int | None = None
    """Pixels from one word to the next; a patch has ceil(patch_size / word_stride) squared words."""
    depth: int | None = None
    """Number of blocks."""
    inner_dim: int | None = None
    """Channels of a word."""
    inner_heads: int | None = None
    """Heads of the attention between the words of a patch."""
    outer_dim: int | None = None
    """Channels of a sentence."""
    outer_heads: int | None = None
    """Heads of the attention between sentences."""
    mlp_ratio: float | None = None
    """Hidden channels of an MLP over its channels."""
    drop_rate: float | None = None
    """Dropout after the positions, in every MLP and after every attention."""
    attn_drop_rate: float | None = None
    """Dropout of attention weights."""
    drop_path_rate: float | None = None
    """Stochastic depth of the last block; it rises linearly from 0 at the first."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What is computed in. Statistics of norms, softmax and logits are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What parameters are stored in."""
    remat: bool | None = None
    """Compute each block again in the backward pass instead of keeping its activations: less memory, more time."""
