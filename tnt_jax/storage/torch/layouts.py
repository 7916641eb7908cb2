"""The published layouts of TNT state dicts, as one table that is used in both directions.

Sources: tnt_pytorch/tnt.py and pyramid_tnt.py of huawei-noah/Efficient-AI-Backbones; timm/models/tnt.py, whose names
the contrastive fork has too; mmpretrain/models/backbones/tnt.py; models/detr of transformers, in the names that
`save_pretrained` writes. huawei has the official architecture and PyramidTNT, mmpretrain the legacy one, timm both of
TNT, transformers either as the backbone of a DETR.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

from tnt_jax.config import InputError

# A row is one tensor, or a module whose `kernel` or `scale` is called `weight` there and whose `bias` is called `bias`.
# A row of `PREFIXES` gives what the names of the rows below begin with.
# {qk,v}: the rows of two tensors, one after the other, are those of ours. -: the layout has no such module.
PREFIXES = ("blocks.*", "encoder.*", "decoder.*")
TNT_TABLE = """
ours                        huawei                      timm                       mmpretrain

class_token                 cls_token                   cls_token                  backbone.cls_token
word_positions              inner_pos                   pixel_pos                  backbone.pixel_pos
sentence_positions          outer_pos                   patch_pos                  backbone.patch_pos
word_embedding.conv         patch_embed.proj            pixel_embed.proj           backbone.pixel_embed.proj
sentence_embedding.norm1    proj_norm1                  norm1_proj                 backbone.norm1_proj
sentence_embedding.proj     proj                        proj                       backbone.projection
sentence_embedding.norm2    proj_norm2                  norm2_proj                 backbone.norm2_proj
norm                        norm                        norm                       backbone.norm
head                        head                        head                       head.fc

blocks.*                    blocks.*                    blocks.*                   backbone.layers.*
.inner.norm1                .inner_norm1                .norm_in                   .inner_block.norm_attn
.inner.attn.qkv.kernel      .inner_attn.{qk,v}.weight   .attn_in.{qk,v}.weight     .inner_block.attn.attn.in_proj_weight
.inner.attn.proj            .inner_attn.proj            .attn_in.proj              .inner_block.attn.attn.out_proj
.inner.norm2                .inner_norm2                .norm_mlp_in               .inner_block.norm_ffn
.inner.mlp.fc1              .inner_mlp.fc1              .mlp_in.fc1                .inner_block.ffn.layers.0.0
.inner.mlp.fc2              .inner_mlp.fc2              .mlp_in.fc2                .inner_block.ffn.layers.1
.words_to_sentence.norm1    .proj_norm1                 .norm1_proj                .norm_proj
.words_to_sentence.proj     .proj                       .proj                      .projection
.words_to_sentence.norm2    .proj_norm2                 .norm2_proj                -
.outer.norm1                .outer_norm1                .norm_out                  .outer_block.norm_attn
.outer.attn.qkv.kernel      .outer_attn.{qk,v}.weight   .attn_out.{qk,v}.weight    .outer_block.attn.attn.in_proj_weight
.outer.attn.proj            .outer_attn.proj            .attn_out.proj             .outer_block.attn.attn.out_proj
.outer.norm2                .outer_norm2                .norm_mlp                  .outer_block.norm_ffn
.outer.mlp.fc1              .outer_mlp.fc1              .mlp.fc1                   .outer_block.ffn.layers.0.0
.outer.mlp.fc2              .outer_mlp.fc2              .mlp.fc2                   .outer_block.ffn.layers.1
.outer.se.norm              .se_layer.fc.0              -                          -
.outer.se.fc1               .se_layer.fc.1              -                          -
.outer.se.fc2               .se_layer.fc.3              -                          -
"""

PYRAMID_TABLE = """
ours                          huawei

word_positions                inner_pos
sentence_positions            outer_pos
stem.common.conv              patch_embed.common_conv.0
stem.common.norm              patch_embed.common_conv.1
stem.words.conv               patch_embed.inner_convs.0
stem.words.norm               patch_embed.inner_convs.1
stem.sentences1.conv          patch_embed.outer_convs.0
stem.sentences1.norm          patch_embed.outer_convs.1
stem.sentences2.conv          patch_embed.outer_convs.3
stem.sentences2.norm          patch_embed.outer_convs.4
stem.sentences3.conv          patch_embed.outer_convs.6
stem.sentences3.norm          patch_embed.outer_convs.7
aggregations.*.word_norm      word_merges.*.norm
aggregations.*.word_conv      word_merges.*.conv.0
aggregations.*.sentence_norm  sentence_merges.*.norm
aggregations.*.sentence_conv  sentence_merges.*.conv.0
stages.*.position_bias        stages.*.relative_pos
norm                          norm
head                          head

stages.*.blocks.*             stages.*.blocks.*
.inner.norm1                  .inner_norm1
.inner.attn.qkv.kernel        .inner_attn.{q,kv}.weight
.inner.attn.proj              .inner_attn.proj
.inner.norm2                  .inner_norm2
.inner.mlp.fc1                .inner_mlp.fc1
.inner.mlp.fc2                .inner_mlp.fc2
.words_to_sentence.norm1      .proj_norm1
.words_to_sentence.proj       .proj
.words_to_sentence.norm2      .proj_norm2
.outer.norm1                  .outer_norm1
.outer.attn.qkv.kernel        .outer_attn.{q,kv}.weight
.outer.attn.proj              .outer_attn.proj
.outer.attn.linear            .outer_attn.linear
.outer.attn.norm              .outer_attn.norm
.outer.norm2                  .outer_norm2
.outer.mlp.fc1                .outer_mlp.fc1
.outer.mlp.fc2                .outer_mlp.fc2
.outer.se.norm                .se_layer.fc.0
.outer.se.fc1                 .se_layer.fc.1
.outer.se.fc2                 .se_layer.fc.3
"""

# Behind a TNT of timm, whose names these begin with, without its norm and its head.
DETR_BACKBONE = "model.backbone.conv_encoder.model.model."
DETR_TABLE = """
ours                          transformers

decoder.projection            model.input_projection
decoder.queries               model.query_position_embeddings.weight
decoder.norm                  model.decoder.layernorm
decoder.classes               class_labels_classifier
decoder.boxes.*               bbox_predictor.layers.*

decoder.encoder.*             model.encoder.layers.*
.attn.q                       .self_attn.q_proj
.attn.k                       .self_attn.k_proj
.attn.v                       .self_attn.v_proj
.attn.proj                    .self_attn.out_proj
.norm1                        .self_attn_layer_norm
.fc1                          .fc1
.fc2                          .fc2
.norm3                        .final_layer_norm

decoder.decoder.*             model.decoder.layers.*
.attn.q                       .self_attn.q_proj
.attn.k                       .self_attn.k_proj
.attn.v                       .self_attn.v_proj
.attn.proj                    .self_attn.out_proj
.norm1                        .self_attn_layer_norm
.cross.q                      .encoder_attn.q_proj
.cross.k                      .encoder_attn.k_proj
.cross.v                      .encoder_attn.v_proj
.cross.proj                   .encoder_attn.out_proj
.norm2                        .encoder_attn_layer_norm
.fc1                          .fc1
.fc2                          .fc2
.norm3                        .final_layer_norm
"""

# Tensors of huawei's models that no forward pass uses: a parameter that is always zero, and a count of batch norm.
UNUSED = re.compile(r"outer_tokens|patch_embed\..*\.num_batches_tracked")
ARCHITECTURES = {
    "huawei": ("official", "pyramid"),
    "timm": ("official", "legacy"),
    "mmpretrain": ("legacy",),
    "transformers": ("official", "legacy"),
}
DETR_HEAD = "detr_unpooled"
"""The head of `ModelConfig` that transformers' `DetrForObjectDetection` has; its layout has no other."""
PROJECTION = "decoder.projection.kernel"
"""A linear map of ours that is a convolution of one pixel there."""
OURS = "tnt_jax"
"""The layout that has our own names and shapes. Only a file that holds its description is in it."""


def _columns(table: str) -> dict[str, dict[str, str]]:
    """layout -> our name -> name there, with the names of blocks and layers written out as `blocks.*...`."""
    header, *rows = [line.split() for line in table.splitlines() if line]
    columns = {layout: {} for layout in header[1:]}
    prefixes = [""] * len(header)
    for row in rows:
        if row[0].endswith(PREFIXES):
            prefixes = row
            continue
        ours, *theirs = [name if name == "-" else prefix + name for prefix, name in zip(prefixes, row, strict=True)]
        for layout, name in zip(header[1:], theirs, strict=True):
            if name != "-":
                columns[layout][ours] = name
    return columns


_NAMES = _columns(TNT_TABLE)
_NAMES["huawei"] |= _columns(PYRAMID_TABLE)["huawei"]  # no name of ours stands for different tensors in the two
_NAMES["transformers"] = _columns(DETR_TABLE)["transformers"] | {
    ours: DETR_BACKBONE + name for ours, name in _NAMES["timm"].items() if ours not in ("norm", "head")
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def tensor_names(path: str, layout: str) -> tuple[str, ...]:
    """The names of a layout's tensors that make up our parameter `path`, such as `blocks.0.inner.norm1.scale`.

    One name, or the names of the tensors whose rows follow each other in ours.

    Raises:
        InputError: the layout has no such module.
    """
    if layout == OURS:
        return (path,)
    names = _NAMES[layout]
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", path)
    pattern = re.sub(r"\.\d+\.", ".*.", path)
    if pattern in names:
        name = names[pattern]
    else:
        module, _, leaf = pattern.rpartition(".")
        if module not in names:
            raise InputError(f"{layout} has no place for {path}")
        name = f"{names[module]}.{_LEAVES[leaf]}"
    for number in numbers:
        name = name.replace("*", number, 1)
    before, braces, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", name).groups()
    return (name,) if braces is None else tuple(before + part + after for part in braces.split(","))


def to_layout(parameters: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the shapes of a layout: (out, in) for linear maps, OIHW for convolutions.

    The arrays are views where they can be. What the layout has and nothing uses is added.
    """
    if layout == OURS:
        return dict(parameters)
    tensors = {}
    for path, value in parameters.items():
        names = tensor_names(path, layout)
        tensors.update(zip(names, _to_torch(path, value, layout, names), strict=True))
        if path.endswith(".norm.mean"):
            tensors[names[0].replace("running_mean", "num_batches_tracked")] = np.int64(0)
    if layout == "huawei" and "class_token" in parameters and "sentence_positions" in parameters:
        _, sentences, dim = parameters["sentence_positions"].shape
        tensors["outer_tokens"] = np.broadcast_to(np.float32(0), (1, sentences - 1, dim))
    return tensors


def from_layout(take: Callable[[str], np.ndarray], path: str, layout: str) -> np.ndarray:
    """The other way: our parameter `path` from the tensors of a layout, which `take` gives by their names."""
    if layout == OURS:
        return take(path)
    return _from_torch(path, [take(name) for name in tensor_names(path, layout)], layout)


def layout_shapes(shapes: Mapping[str, tuple[int, ...]], layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a state dict in a layout has, from the shapes of our parameters."""
    stand_ins = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in to_layout(stand_ins, layout).items()}


def _to_torch(path: str, value: np.ndarray, layout: str, names: tuple[str, ...]) -> list[np.ndarray]:
    if path == "word_positions" and layout != "huawei":  # (1, words, inner) to a map, (1, inner, rows, columns)
        _, words, inner = value.shape
        side = round(words**0.5)
        return [value.transpose(0, 2, 1).reshape(1, inner, side, side)]
    if path.endswith("kernel"):
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    if path == PROJECTION:
        value = value[..., None, None]
    if len(names) == 2:
        thirds = 2 if ".qk." in names[0] else 1  # query and key in the first, or query alone
        return np.split(value, [thirds * len(value) // 3])
    return [value]


def _from_torch(path: str, values: list[np.ndarray], layout: str) -> np.ndarray:
    value = values[0] if len(values) == 1 else np.concatenate(values)
    if path == "word_positions" and layout != "huawei":
        return value.reshape(*value.shape[:2], -1).transpose(0, 2, 1)
    if path == PROJECTION:
        value = value[..., 0, 0]
    if path.endswith("kernel"):
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value
