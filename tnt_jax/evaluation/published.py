"""Accuracies that others have published for the published weights, to stand beside ours. None was measured here."""

import dataclasses

from tnt_jax.config import ModelConfig
from tnt_jax.models.variants import VARIANTS

# Top-1 in percent of timm's weights: its results lists (results-imagenet-real.csv, -v2-matched-frequency, -r, -a and
# results-sketch.csv), as of timm 1.0. They are of all images and of the classes that each dataset has.
TIMM = {
    "tnt_s_legacy_patch16_224": (86.908, 70.860, 43.767, 31.663, 24.573),
    "tnt_s_patch16_224": (86.763, 70.170, 42.697, 30.191, 24.627),
    "tnt_b_patch16_224": (87.585, 72.370, 46.930, 33.713, 32.200),
}
TIMM_DATA = ("imagenet-real", "imagenet-v2", "imagenet-r", "imagenet-sketch", "imagenet-a")
HOW_COMPUTED = ("dtype", "param_dtype", "remat", "drop_rate", "attn_drop_rate", "drop_path_rate", "head_drop_rate")


def published(config: ModelConfig, data: str) -> dict[str, float]:
    """top1 and top5 (shares) that were published of a model on `imagenet` or a relative of it; what is unknown is left
    out.

    Nothing was published of a model of other sizes than those that its name stands for; of its weights, this does not
    know whether they are the published ones.
    """
    variant = VARIANTS.get(config.name)
    if variant is None or any(
        getattr(config, field.name) != getattr(variant.config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in HOW_COMPUTED
    ):
        return {}
    if data == "imagenet":
        percent = {"top1": variant.published_top1, "top5": variant.published_top5}
    else:
        percent = {"top1": dict(zip(TIMM_DATA, TIMM.get(config.name, ()), strict=False)).get(data)}
    return {name: round(value / 100, 5) for name, value in percent.items() if value is not None}
