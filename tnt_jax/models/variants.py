"""The table of published models: their sizes, and what was published of them."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tnt_jax.config import InputError, ModelChanges, ModelConfig, TrainConfig
from tnt_jax.fields import faults, plain
from tnt_jax.models import heads, pyramid_tnt
from tnt_jax.models.heads import DensePyramidTNT, DenseTNT
from tnt_jax.models.layers import ABSTRACT
from tnt_jax.models.pyramid_tnt import PyramidTNT
from tnt_jax.models.tnt import TNT

Model = TNT | PyramidTNT


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published model. `parameters` and `macs` (multiply-accumulates per image) are exact and asserted by tests.

    Accuracies are in percent on the ImageNet-1k validation set, as the paper's table 4, timm's results list or huawei's
    page of PyramidTNT publish them; none of them was measured by this project.
    """

    config: ModelConfig
    parameters: int
    macs: int
    published_top1: float | None
    published_top5: float | None
    weights: tuple[str, ...] = ()
    """The places of published weights: names on the Hugging Face hub, and addresses."""


_TNT_S = ModelConfig(
    name="tnt_s_patch16_224",
    image_size=(224, 224),
    in_channels=3,
    num_classes=1000,
    architecture="official",
    patch_size=16,
    word_stride=4,
    depth=12,
    inner_dim=24,
    inner_heads=4,
    outer_dim=384,
    outer_heads=6,
    inner_blocks=tuple(range(12)),
    squeeze_excitation=False,
    word_positions=True,
    sentence_positions=True,
    mlp_ratio=4.0,
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.1,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    inner="auto",
)
_TNT_TI = dataclasses.replace(
    _TNT_S, name="tnt_ti_patch16_224", inner_dim=12, inner_heads=2, outer_dim=192, outer_heads=3
)
_TNT_B = dataclasses.replace(
    _TNT_S, name="tnt_b_patch16_224", inner_dim=40, inner_heads=4, outer_dim=640, outer_heads=10
)


_PTNT_S = dataclasses.replace(
    _TNT_S,
    name="ptnt_s_patch16_256",
    image_size=(256, 256),
    architecture="pyramid",
    patch_size=8,
    word_stride=2,
    depth=(2, 8, 4, 2),
    inner_blocks=pyramid_tnt.inner_blocks((2, 8, 4, 2)),
    inner_dim=(8, 16, 32, 32),
    inner_heads=(2, 4, 8, 8),
    outer_dim=(128, 256, 512, 512),
    outer_heads=(4, 8, 16, 16),
)
_PTNT_TI = dataclasses.replace(
    _PTNT_S,
    name="ptnt_ti_patch16_192",
    image_size=(192, 192),
    depth=(2, 6, 3, 2),
    inner_blocks=pyramid_tnt.inner_blocks((2, 6, 3, 2)),
    inner_dim=(5, 10, 20, 20),
    inner_heads=(1, 2, 4, 4),
    outer_dim=(80, 160, 320, 320),
    outer_heads=(2, 4, 8, 8),
)
_PTNT_M = dataclasses.replace(
    _PTNT_S,
    name="ptnt_m_patch16_256",
    depth=(2, 8, 6, 2),
    inner_blocks=pyramid_tnt.inner_blocks((2, 8, 6, 2)),
    inner_dim=(12, 24, 48, 48),
    outer_dim=(192, 384, 768, 768),
)
_PTNT_B = dataclasses.replace(
    _PTNT_S,
    name="ptnt_b_patch16_256",
    depth=(2, 10, 6, 2),
    inner_blocks=pyramid_tnt.inner_blocks((2, 10, 6, 2)),
    inner_dim=(16, 32, 64, 64),
    outer_dim=(256, 512, 1024, 1024),
)


def _legacy(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, name=config.name.replace("_patch", "_legacy_patch"), architecture="legacy")


_S_MACS, _TI_MACS, _B_MACS = 5_216_875_008, 1_403_721_984, 14_049_082_880
_HUAWEI = "https://github.com/huawei-noah/Efficient-AI-Backbones/releases/download/tnt"
_CONTRASTIVE = "https://github.com/contrastive/pytorch-image-models/releases/download/TNT/tnt_s_patch16_224.pth.tar"
_MMPRETRAIN = "https://download.openmmlab.com/mmclassification/v0/tnt/tnt-small-p16_3rdparty_in1k_20210903-c56ee7df.pth"
# On Baidu's disk, which asks for a password; this page has the links and the passwords.
_PTNT_WEIGHTS = "https://github.com/huawei-noah/Efficient-AI-Backbones/tree/master/tnt_pytorch"

VARIANTS = {
    variant.config.name: variant
    for variant in (
        Variant(_TNT_TI, 6_076_408, _TI_MACS, published_top1=73.9, published_top5=91.9),
        Variant(
            _TNT_S,
            23_768_584,
            _S_MACS,
            published_top1=81.5,
            published_top5=95.7,
            weights=("timm/tnt_s_patch16_224.in1k", f"{_HUAWEI}/tnt_s_81.5.pth.tar"),
        ),
        Variant(
            _TNT_B,
            65_428_680,
            _B_MACS,
            published_top1=82.9,
            published_top5=96.3,
            weights=("timm/tnt_b_patch16_224.in1k", f"{_HUAWEI}/tnt_b_82.9.pth.tar"),
        ),
        Variant(_legacy(_TNT_TI), 6_069_784, _TI_MACS, published_top1=None, published_top5=None),
        Variant(
            _legacy(_TNT_S),
            23_755_336,
            _S_MACS,
            published_top1=81.512,
            published_top5=95.742,
            weights=("timm/tnt_s_legacy_patch16_224.in1k", _MMPRETRAIN, _CONTRASTIVE),
        ),
        Variant(_legacy(_TNT_B), 65_406_600, _B_MACS, published_top1=None, published_top5=None),
        Variant(_PTNT_TI, 10_578_529, 586_434_560, published_top1=75.2, published_top5=None, weights=(_PTNT_WEIGHTS,)),
        Variant(_PTNT_S, 31_953_200, 3_283_341_312, published_top1=82.0, published_top5=None, weights=(_PTNT_WEIGHTS,)),
        Variant(_PTNT_M, 84_943_572, 8_204_630_016, published_top1=83.5, published_top5=None, weights=(_PTNT_WEIGHTS,)),
        Variant(
            _PTNT_B, 156_990_072, 15_966_642_176, published_top1=84.1, published_top5=None, weights=(_PTNT_WEIGHTS,)
        ),
    )
}

ALIASES = {"tnt-small-p16_3rdparty_in1k": "tnt_s_legacy_patch16_224"}
"""mmpretrain's names. timm's names with the tag of their weights, `[timm/]NAME.in1k`, are understood as well."""


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` takes and that match a shell wildcard such as `tnt_*`, sorted."""
    return sorted(fnmatch.filter([*VARIANTS, *ALIASES], pattern))


def get_variant(name: str) -> Variant:
    """The published model called `name`.

    Raises:
        InputError: no model is called so; the message has the nearest names.
    """
    name = ALIASES.get(name, name)
    if name.endswith(".in1k"):
        name = name.removeprefix("timm/").removesuffix(".in1k")
    if name not in VARIANTS:
        nearest = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4) or list_models()
        raise InputError(f"there is no model {name!r}; the nearest names are {', '.join(nearest)}")
    return VARIANTS[name]


SIZES = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.name not in ("name", "image_size", "in_channels", "num_classes", "dtype", "param_dtype", "remat", "inner")
    and not field.name.startswith(("drop_", "attn_drop_", "head"))
)
"""The fields that say which network it is, whatever it is fed and however it is computed."""


def resolve(changes: ModelChanges) -> ModelConfig:
    """The complete configuration: every field that is None as the published model of that name has it, and checked.

    Raises:
        InputError: an unknown name, a value that means nothing, or sizes that contradict each other.
    """
    given = {field.name: plain(getattr(changes, field.name)) for field in dataclasses.fields(changes)}
    given = {name: value for name, value in given.items() if value is not None}
    published = get_variant(given.pop("name")).config
    if isinstance(given.get("image_size"), int):
        given["image_size"] = (given["image_size"],) * 2
    if "inner_blocks" not in given and not {"depth", "architecture"}.isdisjoint(given):
        given["inner_blocks"] = None
    config = dataclasses.replace(published, **given)
    if config.inner_blocks is None:
        check_sizes(dataclasses.replace(config, inner_blocks=()))
        config = dataclasses.replace(config, inner_blocks=_published_inner_blocks(config))
    check_sizes(config)
    return dataclasses.replace(config, name=name_of_sizes(config))


def complete(config: TrainConfig[ModelChanges], num_classes: int) -> TrainConfig[ModelConfig]:
    """A run with the complete configuration of its model, for data with this many classes.

    Raises:
        InputError: as `resolve`; or the run asks for another number of classes.
    """
    asked = config.model.num_classes
    if asked not in (None, num_classes):
        raise InputError(f"model.num_classes is {asked}, and {config.data.source} has {num_classes} classes")
    return dataclasses.replace(config, model=resolve(dataclasses.replace(config.model, num_classes=num_classes)))


def as_changes(config: ModelConfig) -> ModelChanges:
    """The complete configuration that `resolve` makes of this one."""
    base = next(name for name, variant in VARIANTS.items() if variant.config.architecture == config.architecture)
    return ModelChanges(**dataclasses.asdict(config) | {"name": config.name if config.name in VARIANTS else base})


def name_of_sizes(config: ModelConfig) -> str:
    """The published model of these sizes, or a name that says that there is none, as tnt_custom_patch8_32."""
    for variant in VARIANTS.values():
        if all(getattr(config, size) == getattr(variant.config, size) for size in SIZES):
            return variant.config.name
    family = {"official": "tnt", "legacy": "tnt_legacy", "pyramid": "ptnt"}[config.architecture]
    height, width = config.image_size
    return f"{family}_custom_patch{config.patch_size}_{height if height == width else f'{height}x{width}'}"


def _published_inner_blocks(config: ModelConfig) -> tuple[int, ...]:
    pyramid = config.architecture == "pyramid"
    return pyramid_tnt.inner_blocks(config.depth) if pyramid else tuple(range(config.depth))


def check_sizes(config: ModelConfig) -> None:
    """Raises InputError for a field whose value means nothing, and for sizes that contradict each other."""
    for fault in faults(config):
        raise InputError(fault)
    _check_stages(config)
    if config.architecture == "pyramid":
        pyramid_tnt.check_pyramid(config)
    heads.check_head(config)
    if min(config.image_size) < config.patch_size or any(side % config.patch_size for side in config.image_size):
        nearest = tuple(max(1, round(side / config.patch_size)) * config.patch_size for side in config.image_size)
        raise InputError(
            f"image_size {config.image_size} is not a multiple of the patch size {config.patch_size}; "
            f"the nearest is {nearest}"
        )
    if config.word_stride > config.patch_size:
        raise InputError(f"word_stride {config.word_stride} is larger than the patch size {config.patch_size}")
    if config.architecture == "legacy" and config.patch_size % config.word_stride:
        raise InputError(
            f"word_stride {config.word_stride} does not divide the patch size {config.patch_size}, "
            "which the legacy architecture needs, since it cuts the convolved image into patches"
        )
    depth = config.depth if isinstance(config.depth, int) else sum(config.depth)
    if outside := [index for index in config.inner_blocks if index >= depth]:
        raise InputError(f"inner_blocks {outside} are out of range: the model has blocks 0 to {depth - 1}")


def _check_stages(config: ModelConfig) -> None:
    """Raises InputError unless a TNT has one number for all blocks and a PyramidTNT one a stage, and heads divide."""
    for field in pyramid_tnt.STAGE_FIELDS:
        value = getattr(config, field)
        if config.architecture == "pyramid" and (isinstance(value, int) or len(value) != pyramid_tnt.STAGES):
            raise InputError(
                f"{field} is {value}, and a PyramidTNT has one for each of its {pyramid_tnt.STAGES} stages"
            )
        if config.architecture != "pyramid" and not isinstance(value, int):
            raise InputError(f"{field} is {value}, and a TNT has one number for all of its blocks")
    for branch in ("inner", "outer"):
        dims, heads = (np.atleast_1d(getattr(config, f"{branch}_{size}")) for size in ("dim", "heads"))
        for dim, count in zip(dims, heads, strict=True):
            if dim % count:
                raise InputError(f"{branch}_dim {dim} cannot be divided among {branch}_heads {count}")


def fresh_model(name: str, *, seed: int = 0, **changes: Any) -> Model:
    """A freshly initialised model, for example `fresh_model("tnt_s_patch16_224", num_classes=10, image_size=(192,
    320))`.

    Args:
        name: one of `list_models()`.
        seed: of the initial parameters; the same seed gives the same model.
        changes: fields of `ModelConfig` that are to differ from the published model.

    Raises:
        InputError: an unknown name, an unknown field, or sizes that contradict each other.
    """
    return build_model(model_config(name, **changes), seed)


def model_config(name: str, **changes: Any) -> ModelConfig:
    """The complete configuration of a published model with other values of some fields.

    Raises:
        InputError: as `fresh_model`.
    """
    _check_names(changes)
    return resolve(ModelChanges(name=name, **changes))


def with_changes(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """A complete configuration with other values of some fields.

    Raises:
        InputError: as `fresh_model`.
    """
    _check_names(changes)
    return resolve(dataclasses.replace(as_changes(config), **changes))


def _check_names(fields: Iterable[str]) -> None:
    known = [field.name for field in dataclasses.fields(ModelChanges)]
    for field in fields:
        if field not in known:
            nearest = difflib.get_close_matches(field, known, n=1) or known
            raise InputError(f"a model has no field {field!r}; did you mean {' or '.join(nearest)}?")


def build_model(config: ModelConfig, seed: int = 0) -> Model:
    """The freshly initialised module that a configuration describes.

    Each parameter is drawn by itself, seeded by its path, so that one more of them changes no other.
    """
    graph, state = nnx.split(abstract_model(config))
    drawn = [
        (path, variable.replace(jnp.asarray(variable.get_value().draw((seed, *".".join(map(str, path)).encode())))))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(drawn))


def abstract_model(config: ModelConfig) -> Model:
    """The module that a configuration describes with shapes in the place of parameters. Nothing is allocated."""
    networks = (TNT, PyramidTNT) if config.head == "class" else (DenseTNT, DensePyramidTNT)
    return networks[config.architecture == "pyramid"](config, rngs=ABSTRACT)


def with_formulation(model: Model, inner: str, **changes: Any) -> Model:
    """The same parameters in a model that computes by another formulation (`ModelConfig.inner`).

    Args:
        changes: other fields of `ModelConfig` that the shapes of parameters do not depend on, such as `dtype`.
    """
    graph, _ = nnx.split(abstract_model(dataclasses.replace(model.config, inner=inner, **changes)))
    return nnx.merge(graph, nnx.state(model))
