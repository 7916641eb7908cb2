"""A model as a repository of the Hugging Face hub, which timm, transformers and this package read by one line.

`model.safetensors` has timm's names, `config.json` is as timm's hub has it, `README.md` is the model card, `model.json`
is ours. What timm has no architecture for has our names, and its card says that only this package reads it.
Source of `config.json`: timm/models/_hub.py, save_config_for_hf.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.variants import VARIANTS, Model
from tnt_jax.storage.card import model_card
from tnt_jax.storage.description import DESCRIPTION, ModelDescription, write_description
from tnt_jax.storage.files import write_whole
from tnt_jax.storage.folder import check_destination, description_with, model_parameters
from tnt_jax.storage.hub import push_folder
from tnt_jax.storage.hub_folder import CONFIG, NAMES, TIMM_ARGUMENTS, open_hub_folder
from tnt_jax.storage.torch.write import state_dict, write_safetensors
from tnt_jax.tasks.table import TASKS

TIMM = ("tnt_s_patch16_224", "tnt_b_patch16_224", "tnt_s_legacy_patch16_224")
"""timm's architectures."""
FILES = (NAMES[0], CONFIG, DESCRIPTION, "README.md")
"""The files of a published folder."""


@dataclasses.dataclass(frozen=True)
class Published:
    """The paths that were written."""

    folder: str
    size: int
    """Bytes of the weights."""
    readers: tuple[str, ...]
    """Who can read it: tnt_jax, timm, transformers."""
    address: str | None
    """Of the repository that it was pushed to."""


def publish(
    model: Model,
    folder: str | os.PathLike,
    *,
    push: str | None = None,
    results: Sequence[dict[str, str]] = (),
    licence: str | None = None,
    overwrite: bool = False,
) -> Published:
    """Writes a model as a folder that the hub takes, after the folder has given the model back, and may push it.

    Args:
        push: OWNER/NAME on the hub.
        results: rows that `eval.py --table FILE.csv` wrote, for the card.
        licence: of the weights, by its SPDX name such as apache-2.0.

    Raises:
        InputError: the folder exists, the model is in no form that can come back, or it cannot be pushed.
    """
    check_destination(folder, overwrite=overwrite, names=FILES)
    description = description_with(model)
    arguments = timm_arguments(description.config)
    parameters = {name: np.asarray(value) for name, value in model_parameters(model).items()}
    tensors = parameters if arguments is None else state_dict(model, "timm")
    card = model_card(description, for_timm=arguments is not None, name=push, results=results, licence=licence)

    def write(unfinished: Path) -> None:
        unfinished.mkdir()
        write_safetensors(tensors, description, unfinished / NAMES[0])
        text = json.dumps(hub_config(description, arguments), indent=2, ensure_ascii=False)
        (unfinished / CONFIG).write_text(text + "\n", encoding="utf-8")
        write_description(unfinished, dataclasses.replace(description, checksums=None))
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        _compare(unfinished, parameters, description)

    write_whole(folder, write)
    readers = ("tnt_jax",) if arguments is None else ("tnt_jax", "timm", "transformers")
    address = push_folder(Path(folder), push) if push else None
    return Published(str(folder), (Path(folder) / NAMES[0]).stat().st_size, readers, address)


def _compare(folder: Path, parameters: dict[str, np.ndarray], description: ModelDescription) -> None:
    """Raises InputError unless the folder gives back what went in."""
    back = open_hub_folder(folder)
    differ = [name for name, value in parameters.items() if not np.array_equal(back.parameters[name], value)]
    if differ or back.description != description:
        raise InputError(f"the model does not come back as it was: {', '.join(differ) or 'its description differs'}")


def timm_arguments(config: ModelConfig) -> dict[str, Any] | None:
    """The arguments for timm's `create_model` beside the architecture; None if timm has nothing of this form."""
    if config.head != "class" or config.architecture == "pyramid":
        return None
    if config.squeeze_excitation or config.mlp_ratio != 4:
        return None
    if not (config.word_positions and config.sentence_positions and config.inner_blocks == tuple(range(config.depth))):
        return None
    base = VARIANTS[architecture_name(config, for_timm=True)].config
    differ = [name for name in TIMM_ARGUMENTS if getattr(config, name) != getattr(base, name)]
    return {TIMM_ARGUMENTS[name]: getattr(config, name) for name in differ}


def architecture_name(config: ModelConfig, *, for_timm: bool) -> str:
    """The published architecture that a configuration is a form of: one of timm's, or else one of ours."""
    known = TIMM if for_timm else VARIANTS
    if config.name in known:
        return config.name
    return next(name for name in known if VARIANTS[name].config.architecture == config.architecture)


def hub_config(description: ModelDescription, arguments: dict[str, Any] | None) -> dict[str, Any]:
    """timm's `config.json`."""
    config, feeding = description.config, description.preprocessing
    outer_dim = config.outer_dim if isinstance(config.outer_dim, int) else config.outer_dim[-1]
    pyramid = config.architecture == "pyramid"
    fields: dict[str, Any] = {
        "architecture": architecture_name(config, for_timm=arguments is not None),
        "num_classes": config.num_classes,
        "num_features": outer_dim,
        "global_pool": "avg" if pyramid else "token",
    }
    if problem_type := TASKS[description.outputs.task].problem_type:
        fields["problem_type"] = problem_type
    if description.class_names:
        fields["label_names"] = list(description.class_names)
    if arguments:
        fields["model_args"] = arguments
    fields["pretrained_cfg"] = {
        "custom_load": False,
        "input_size": [config.in_channels, *config.image_size],
        "fixed_input_size": True,
        "interpolation": feeding.interpolation,
        "crop_pct": feeding.crop,
        "crop_mode": "center",
        "mean": list(feeding.mean),
        "std": list(feeding.std),
        "num_classes": config.num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.common_conv.0" if pyramid else "pixel_embed.proj",
        "classifier": "head",
    }
    return fields
