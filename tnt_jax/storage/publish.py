"""A model as a repository of the Hugging Face hub, which timm, transformers and this package read by one line.

`model.safetensors` has timm's names, `config.json` is as timm's hub has it, `README.md` is the model card, `model.json`
is ours. What timm has no architecture for has our names, and its card says that only this package reads it.
Source of `config.json`: timm/models/_hub.py, save_config_for_hf.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.models.variants import VARIANTS, Model
from tnt_jax.storage.description import DESCRIPTION, ModelDescription, without_places, write_description
from tnt_jax.storage.files import write_whole
from tnt_jax.storage.folder import check_destination, description_with, model_parameters
from tnt_jax.storage.hub import CONFIG, NAMES, TIMM_ARGUMENTS, open_hub_folder, push_folder
from tnt_jax.storage.torch.write import state_dict, write_safetensors
from tnt_jax.tasks.table import TASKS, metric_of

PAPERS = {False: "arXiv 2103.00112", True: "arXiv 2201.00978"}
KINDS = {
    "official": "Transformer in Transformer (TNT), the official architecture",
    "legacy": "Transformer in Transformer (TNT), the legacy architecture of mmpretrain's `tnt-small-p16_3rdparty_in1k`",
    "pyramid": "PyramidTNT",
}
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


def model_card(
    description: ModelDescription,
    *,
    for_timm: bool,
    name: str | None,
    results: Sequence[Mapping[str, str]],
    licence: str | None,
) -> str:
    """The text of `README.md`, with the fields that the hub reads at its top.

    Args:
        for_timm: whether timm and transformers can read the weights.
        name: OWNER/NAME, if it is known.
        results: rows of a table that `eval.py` wrote.
        licence: an SPDX name; by default that of published weights, where these are some.
    """
    config, published = description.config, _is_published(description)
    title = name or config.name
    licence = licence or ("apache-2.0" if published else None)
    readers = ["timm", "transformers"] if for_timm else []
    task = TASKS[description.outputs.task]
    head = [f"library_name: {'timm' if for_timm else 'tnt_jax'}"]
    head += [f"pipeline_tag: {task.pipeline}"] if task.pipeline else []
    head += [f"license: {licence}"] if licence else []
    head += ["tags:", *(f"- {tag}" for tag in (task.tag, "tnt_jax", "jax", *readers))]
    parts = ["---", *head, "---", f"# {title}", "", *_what_it_is(description), "", "## Training", ""]
    parts += [*_training(description), "", "## Results", "", *_results(description, results, published), ""]
    parts += ["## Loading", "", *_loading(name or "OWNER/NAME", for_timm), "", "## Licence", ""]
    parts.append(licence or "Nobody has said under which licence these weights are; ask whoever published them.")
    return "\n".join(parts) + "\n"


def _is_published(description: ModelDescription) -> bool:
    """True for published weights, unchanged."""
    source = description.source or {}
    places = [place for variant in VARIANTS.values() for place in variant.weights]
    return description.config.name in VARIANTS and (source.get("hub") in places or source.get("address") in places)


def _what_it_is(description: ModelDescription) -> list[str]:
    config, feeding = description.config, description.preprocessing
    height, width = config.image_size
    task = TASKS[description.outputs.task]
    classes = f"{config.num_classes} {task.noun}" if config.num_classes else "no head: its output is the class token"
    names = description.class_names
    listed = f", {names[0]} to {names[-1]}" if names else ""
    shown = f"cover 1 / {feeding.crop:g} of that size, cut at the centre"
    shown = "fit whole into that size, which the mean fills" if task.dense else shown
    return [
        f"{KINDS[config.architecture]} ({PAPERS[config.architecture == 'pyramid']}), `{config.name}`, for images of "
        f"{height}x{width}, {classes}{listed}.",
        f"Images are resized ({feeding.interpolation}) until they {shown}, and normalised with mean "
        f"{_numbers(feeding.mean)} and standard deviation {_numbers(feeding.std)}.",
        *task.meaning(description.outputs),
    ]


def _numbers(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else ", ".join(f"{value:g}" for value in values)


def _training(description: ModelDescription) -> list[str]:
    source = description.source or {}
    lines = []
    if "run" in source:
        step = f" at step {source['step']}" if "step" in source else ""
        weights = {"ema": "averaged ", "raw": "raw "}.get(source.get("weights"), "")
        lines.append(
            f"Trained by tnt_jax on `{without_places(source.get('data'))}`; these are the {weights}weights{step}."
        )
        configuration = Path(str(source["run"])) / "config.json"
        if configuration.is_absolute() and configuration.is_file():
            lines += ["", "The configuration of the run:", "", "```json", _shortened(configuration), "```"]
    elif "hub" in source or "address" in source:
        lines.append(f"Converted from {source.get('hub') or source.get('address')}, not trained by tnt_jax.")
    elif "file" in source:
        lines.append(f"Converted from `{source['file']}` (SHA-256 {source.get('sha256')}), not trained by tnt_jax.")
    else:
        lines.append("Nothing is recorded of how it was trained.")
    return lines


def _shortened(configuration: Path) -> str:
    """The configuration without where on somebody's disk the run and its data lay."""
    fields = without_places(json.loads(configuration.read_text(encoding="utf-8")))
    return json.dumps({name: value for name, value in fields.items() if name != "run_dir"}, indent=1)


def _results(description: ModelDescription, rows: Sequence[Mapping[str, str]], published: bool) -> list[str]:
    lines, scores = [], (description.source or {}).get("scores")
    if isinstance(scores, Mapping) and scores:
        which = {"ema": "ema_", "raw": "raw_"}.get((description.source or {}).get("weights"), "")
        own = {name.removeprefix(which): value for name, value in scores.items() if name.startswith(which)}
        own = {name: value for name, value in own.items() if value is not None and math.isfinite(value)}
        lines += ["Measured while it was trained, on the images that chose the checkpoint:", ""]
        lines += [f"- {name}: {_score(name, value)}" for name, value in own.items()]
        lines += ["", "`python eval.py RUN` measures it again."]
    if rows:
        lines += ["", "Measured by `python eval.py MODEL --source SOURCE --table FILE.csv`:", ""]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |" for row in rows]
    if published:
        variant = VARIANTS[description.config.name]
        lines += ["", f"Published of these weights, not measured by tnt_jax (ImageNet-1k validation): top-1 "
                  f"{variant.published_top1}, top-5 {variant.published_top5}."]  # fmt: skip
    return lines or ["Nothing was measured. `python eval.py MODEL --source SOURCE` does it."]


def _score(name: str, value: Any) -> str:
    return f"{100 * value:.2f}%" if metric_of(name).proportion else f"{value:.4f}"


def _cell(text: str) -> str:
    return re.sub(r"[|\n]", " ", text)


def _loading(name: str, for_timm: bool) -> list[str]:
    lines = ["```python", "import tnt_jax", "", f'model = tnt_jax.load_model("{name}")']
    lines += [f'tnt_jax.inference_model("{name}", "image.jpg")', "```", ""]
    if not for_timm:
        return [*lines, "timm and transformers have no architecture of this form: only tnt_jax reads it."]
    lines += ["```python", "import timm", "", f'model = timm.create_model("hf-hub:{name}", pretrained=True)', "```"]
    lines += ["", "```python", "import transformers", ""]
    lines += [f'classify = transformers.pipeline("image-classification", "{name}")', 'classify("image.jpg")', "```"]
    return lines
