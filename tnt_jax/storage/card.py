"""The model card of a repository on the hub: what the model is, what is known of it, and how to load it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnt_jax.models.variants import VARIANTS
from tnt_jax.storage.description import ModelDescription, without_places
from tnt_jax.tasks.table import TASKS, metric_of

PAPERS = {False: "arXiv 2103.00112", True: "arXiv 2201.00978"}
KINDS = {
    "official": "Transformer in Transformer (TNT), the official architecture",
    "legacy": "Transformer in Transformer (TNT), the legacy architecture of mmpretrain's `tnt-small-p16_3rdparty_in1k`",
    "pyramid": "PyramidTNT",
}


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
