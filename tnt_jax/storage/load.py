"""A model from wherever it lies: the one place that decides what a MODEL is, for every command and function.

A model folder, the folder of a training run, a published name (ours, mmpretrain's, timm's), OWNER/NAME or
OWNER/NAME@REVISION on the Hugging Face hub, `hf-hub:OWNER/NAME`, `local-dir:FOLDER` of a hub repository, an address of
a checkpoint, or a checkpoint file.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tnt_jax.config import InputError, ModelConfig
from tnt_jax.data.classes import match_classes
from tnt_jax.models import variants
from tnt_jax.models.adapting import adapt, select_classes
from tnt_jax.models.variants import ALIASES, Model, get_variant, with_changes
from tnt_jax.storage.description import DESCRIPTION, describe, description_of, read_description
from tnt_jax.storage.download import Unreachable, cached_file, download, without_secrets
from tnt_jax.storage.folder import PARAMETERS, model_from_parameters, model_parameters, restore_parameters
from tnt_jax.storage.hub import cached_repository, fetch_repository, is_hub_name, open_hub_folder, weights_file
from tnt_jax.storage.places import BucketPath, is_bucket, place
from tnt_jax.storage.run import is_hub_folder, is_run, load_run
from tnt_jax.storage.torch.checkpoint import Opened, is_published, open_checkpoint
from tnt_jax.tasks.task import Outputs

_log = logging.getLogger(__name__)

LONGEST = 1024  # letters of a MODEL; no system has longer paths
Kind = Literal["folder", "run", "hub folder", "file", "published", "hub", "address"]


@dataclasses.dataclass(frozen=True)
class ModelPlace:
    """The place of a model."""

    kind: Kind
    where: str
    """A path; a name on the hub; an address; or the published name as it was given."""

    @property
    def path(self) -> Path | BucketPath:
        """Of a folder or a file."""
        return place(self.where)


def locate(model: str | os.PathLike) -> ModelPlace:
    """The place of a MODEL. Nothing is read but names of files, and nothing is fetched.

    Raises:
        InputError: it is nothing of all this; the message says what is nearest.
    """
    given = os.fspath(model)
    prefix, colon, rest = given.partition(":")
    if colon and prefix.lower() in ("hf-hub", "hf_hub", "local-dir"):
        if prefix.lower() == "local-dir":
            folder = Path(rest).expanduser()
            if not folder.is_dir():
                raise InputError(f"there is no folder {rest}, which {given} names")
            return ModelPlace("hub folder", str(folder))
        if not is_hub_name(rest):
            raise InputError(f"{given} should be hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION")
        return ModelPlace("hub", rest)
    if re.match(r"[a-z][a-z0-9+.-]*://", given, re.IGNORECASE):
        if is_bucket(given):
            if not is_run(given):
                raise InputError(f"{given} holds no run; of a bucket, only runs are read")
            return ModelPlace("run", given)
        if not given.lower().startswith(("https://", "http://")):
            shown = without_secrets(given)
            raise InputError(f"{shown} is no https:// address, and no other kind of address is fetched")
        return ModelPlace("address", given)
    path = Path(os.path.expanduser(given))
    if len(given) > LONGEST or "\0" in given:
        raise InputError(f"there is no model {given[:60]!r}... of {len(given)} letters")
    if path.is_dir():
        return ModelPlace(_kind_of_folder(path), str(path))
    if path.exists():
        return ModelPlace("file", str(path))
    try:
        get_variant(given)
        return ModelPlace("published", given)
    except InputError as error:
        if is_hub_name(given) and not path.parent.exists():
            return ModelPlace("hub", given)
        nothing = f"there is no folder {given} and no file"
        raise InputError(nothing if os.sep in given else f"{nothing}, and {error}") from error


def _kind_of_folder(folder: Path) -> Kind:
    if is_hub_folder(folder) and not (folder / PARAMETERS).is_dir():
        return "hub folder"
    if is_run(folder):
        return "run"
    if (folder / DESCRIPTION).exists() or weights_file(folder) is None:
        return "folder"
    return "hub folder"


def published_places(name: str) -> tuple[str, ...]:
    """The places of the weights of a published name, in the order in which they are tried: on the hub, and addresses.

    Raises:
        InputError: nobody has published weights of it, or they lie where no program can fetch them.
    """
    variant = get_variant(name)
    if not variant.weights:
        raise InputError(
            f"nobody has published weights of {variant.config.name}; train it, or give a folder or file of your own"
        )
    places = [place for place in variant.weights if is_hub_name(place) or not _is_page(place)]
    if not places:
        raise InputError(
            f"the published weights of {variant.config.name} lie where no program can fetch them, behind the passwords "
            f"on {variant.weights[0]}; download the file there, and give it instead of the name"
        )
    if name in ALIASES:  # mmpretrain's own file first
        places.sort(key=lambda place: "openmmlab" not in place)
    return tuple(places)


def _is_page(address: str) -> bool:
    return "." not in address.rpartition("/")[2]


def load_model(
    model: str | os.PathLike,
    *,
    weights: Literal["ema", "raw"] | None = None,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Model:
    """A model from wherever it lies.

    What has to be fetched is kept in the user's cache: the next call needs no network.

    Args:
        model: a model folder, the folder of a training run, a published name (ours, mmpretrain's or timm's),
            `OWNER/NAME[@REVISION]` on the Hugging Face hub (also as `hf-hub:OWNER/NAME`), `local-dir:FOLDER` of a hub
            repository, an address of a checkpoint, or a checkpoint file of PyTorch or safetensors in any layout.
        weights: of a training run or checkpoint: the average of the parameters over the steps, or the parameters
            themselves; by default the average where there is one.
        step: of a training run: one whose checkpoint is kept; by default the best on the test images.
        dtype: what is computed in, whatever it was trained in; the parameters stay as they are.

    Raises:
        InputError: it is not there or cannot be fetched, it is damaged, or it is no TNT; or an unknown dtype.
    """
    changes = {} if dtype is None else {"dtype": dtype}
    opened = open_model(model, weights=weights, step=step)
    for note in opened.notes:
        _log.info("%s: %s", model, note)
    loaded = model_from_parameters(with_changes(opened.description.config, changes), opened.parameters)
    loaded.description = opened.description
    return loaded


def create_model(name: str, pretrained: bool | str | os.PathLike = False, *, seed: int = 0, **changes: Any) -> Model:
    """A model by its name, freshly initialised or with its published weights.

    For example `create_model("tnt_s_patch16_224", pretrained=True, num_classes=10, image_size=384)`, whose head is
    fresh and whose positions are resized, which is said. `in_channels` adapts the first filters as timm does.

    Args:
        name: one of `list_models()`; with `pretrained=True` anything that `load_model` takes.
        pretrained: whether to take the published weights; or the MODEL that has them.
        seed: of the initial parameters; the same seed gives the same model.
        changes: fields of `ModelConfig` that are to differ from the published model.

    Raises:
        InputError: an unknown name or field, sizes that contradict each other, weights that nobody has published, or
            what `load_model` raises.
    """
    if pretrained is False:
        return variants.fresh_model(name, seed=seed, **changes)
    opened = open_model(name if pretrained is True else pretrained)
    known = opened.description
    wanted = with_changes(known.config, changes)
    parameters, notes = adapt(opened.parameters, known.config, wanted, seed=seed)
    for note in notes:
        _log.warning("%s: %s", name, note)
    model = model_from_parameters(wanted, parameters)
    same = wanted.num_classes == known.config.num_classes
    model.description = describe(
        wanted,
        class_names=known.class_names if same else None,
        source=known.source,
        preprocessing=known.preprocessing.adapted(wanted),
        outputs=known.outputs if same else None,
    )
    return model


get_model = create_model  # mmpretrain's name of it


def open_model(
    model: str | os.PathLike,
    *,
    weights: Literal["ema", "raw"] | None = None,
    step: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Opened:
    """The parameters of a MODEL and their description; see `load_model`.

    Args:
        image_size: height and width that the positions of a checkpoint were made for, where they are no square.

    Raises:
        InputError: as `load_model`.
    """
    found = locate(model)
    if step is not None and found.kind != "run":
        raise InputError(f"step {step} was asked for, and {model} is not the folder of a training run")
    if found.kind == "run":
        loaded = load_run(found.path, weights=weights or "ema", step=step)
        return Opened(model_parameters(loaded), description_of(loaded))
    if found.kind == "folder" and weights is not None:
        raise InputError(f"{weights} weights were asked for, and {model} is a model folder, which holds one model")
    if found.kind == "folder":
        return _open_folder(found.path)
    if found.kind == "hub folder":
        return open_hub_folder(found.path, weights=weights)
    if found.kind == "file":
        return open_checkpoint(found.path, weights=weights, image_size=image_size)
    if found.kind != "published":
        return _fetched(found.where, weights, image_size, is_published(found.where))
    reasons, places = [], published_places(found.where)
    for where in sorted(places, key=lambda where: not _is_cached(where)):
        try:
            opened = _fetched(where, weights, image_size, published=True)
            check_published(opened.description.config, found.where, where)
            return opened
        except Unreachable as error:
            reasons.append(error.why)
    pages = [f"https://huggingface.co/{where}" if is_hub_name(where) else where for where in places]
    raise InputError(
        f"the published weights of {model} cannot be fetched: {'; '.join(dict.fromkeys(reasons))}\n"
        f"put one of these files beside you: {', '.join(pages)}\n"
        "and give it instead of the name: load_model('FILE')"
    )


def open_for(
    model: str | os.PathLike,
    wanted: ModelConfig,
    class_names: Sequence[str],
    data: str,
    *,
    outputs: Outputs | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The parameters of a MODEL for a model that is to learn the classes of a dataset.

    Positions are resized. Of a head whose classes have names, those of the dataset are taken by name; where it has
    others the head is fresh. What was changed is said.

    Args:
        wanted: the configuration of the model that is to have them.
        class_names: of the dataset.
        data: what the dataset is called.
        outputs: what those of the wanted model are to mean. A head of another task is left out; one of a regression
            is brought to the mean and standard deviation of these.
        seed: of a fresh head.

    Raises:
        InputError: as `load_model`; or the parameters are those of a model of another form.
    """
    opened = open_model(model)
    known, parameters, notes = opened.description, dict(opened.parameters), []
    config = known.config
    outputs = outputs or Outputs()
    if config.num_classes and known.outputs.task != outputs.task:
        parameters, config = select_classes(parameters, config, None)
        notes.append(f"its outputs are of task {known.outputs.task}, and {outputs.task} is wanted: the head is fresh")
    elif known.class_names and config.num_classes:
        try:
            match = match_classes(known.class_names, config.num_classes, class_names, data)
            if outputs.target_mean is not None or known.outputs.target_mean is not None:
                parameters = rescale_head(parameters, known.outputs, match.of_model, outputs)
                config = dataclasses.replace(config, num_classes=len(class_names))
            else:
                parameters, config = select_classes(parameters, config, match.of_model)
            notes += [match.note] if match.note else []
        except InputError as error:
            parameters, config = select_classes(parameters, config, None)
            notes.append(f"{error}: the head is fresh")
    parameters, adapted = adapt(parameters, config, wanted, seed=seed)
    for note in (*notes, *(note for note in adapted if config.num_classes or "head" not in note)):
        _log.warning("%s: %s", model, note)
    return parameters


def rescale_head(
    parameters: dict[str, Any], known: Outputs, chosen: np.ndarray, wanted: Outputs
) -> dict[str, np.ndarray]:
    """The parameters with a head of the chosen targets that says the same of them for another mean and std."""
    before, after = (
        (np.asarray(each.target_mean or 0.0), np.asarray(each.target_std or 1.0)) for each in (known, wanted)
    )
    mean, std = (np.broadcast_to(each, (parameters["head.bias"].shape[-1],))[chosen] for each in before)
    kernel, bias = (np.asarray(parameters[f"head.{name}"], np.float64)[..., chosen] for name in ("kernel", "bias"))
    changed = {"head.kernel": kernel * std / after[1], "head.bias": (bias * std + mean - after[0]) / after[1]}
    return parameters | {name: value.astype(np.asarray(parameters[name]).dtype) for name, value in changed.items()}


def check_published(config: ModelConfig, name: str, where: str) -> None:
    """Raises InputError unless weights that were fetched are those of the model that has the name."""
    wanted = get_variant(name).config.name
    if config.name != wanted:
        raise InputError(f"{where} holds {config.name}, and {name} is {wanted}")


def _open_folder(folder: Path) -> Opened:
    description = read_description(folder)
    return Opened(restore_parameters(folder, description), description)


def _is_cached(where: str) -> bool:
    """True if a place need not be asked."""
    return bool(cached_repository(where) if is_hub_name(where) else cached_file(where))


def _fetched(
    where: str, weights: Literal["ema", "raw"] | None, image_size: tuple[int, int] | None, published: bool
) -> Opened:
    """The model at an address or in a repository of the hub, whose files are kept."""
    if is_hub_name(where):
        return open_hub_folder(fetch_repository(where), weights=weights, source={"hub": where}, published=published)
    path, source = download(where), {"address": without_secrets(where)}
    return open_checkpoint(path, weights=weights, image_size=image_size, source=source, published=published)
