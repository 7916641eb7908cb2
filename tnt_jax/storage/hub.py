"""Repositories of the Hugging Face hub: fetched and pushed by `huggingface_hub`, which keeps what it has fetched
(`HF_HOME`), and read as folders of weights with timm's `config.json`.
"""

import dataclasses
import errno
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tnt_jax.config import InputError
from tnt_jax.data.classes import named_classes
from tnt_jax.fields import plain
from tnt_jax.models.variants import VARIANTS
from tnt_jax.storage.description import ModelDescription, describe
from tnt_jax.storage.download import Unreachable
from tnt_jax.storage.files import first_line
from tnt_jax.storage.torch.checkpoint import Opened, open_checkpoint
from tnt_jax.user_cache import process_folder

CONFIG = "config.json"
NAMES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")
# The name of timm's argument for each size of ours that it can be told.
TIMM_ARGUMENTS = {
    "image_size": "img_size",
    "in_channels": "in_chans",
    "patch_size": "patch_size",
    "word_stride": "first_stride",
    "depth": "depth",
    "inner_dim": "inner_dim",
    "inner_heads": "num_heads_inner",
    "outer_dim": "embed_dim",
    "outer_heads": "num_heads_outer",
}
# What its other arguments have to be; those that only training asks are left alone.
# Its mlp_ratio is that of the outer MLP alone.
_TIMM_FIXED = {"global_pool": "token", "qkv_bias": False, "mlp_ratio": 4.0}
_TIMM_TRAINING = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "num_classes")
CONNECT = 10.0  # seconds to wait for a connection
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_hub_name(text: str) -> bool:
    """True if this has the form OWNER/NAME or OWNER/NAME@REVISION, such as `timm/tnt_s_patch16_224.in1k`."""
    return _NAME.fullmatch(text) is not None


def fetch_repository(name: str) -> Path:
    """The folder with the weights of OWNER/NAME[@REVISION] and what describes them, from the cache if they are there.

    Raises:
        Unreachable: the hub cannot be reached or has no such repository; the message says what to do.
        InputError: the repository has no weights, or the cache cannot be written.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    command = f"On a machine that reaches it: hf download {repository} --local-dir FOLDER, then give local-dir:FOLDER"
    if found := cached_repository(name):
        return found
    try:
        # This answers or fails at once, where a download tries for half a minute.
        huggingface_hub.HfApi().model_info(repository, revision=revision or None, timeout=CONNECT)
        found = _download(repository, revision or None)
    except errors.GatedRepoError as error:
        advice = "Ask for access on its page, and log in with `hf auth login`"
        raise Unreachable(name, "on the Hugging Face hub it is gated", advice) from error
    except errors.RevisionNotFoundError as error:
        raise Unreachable(name, f"on the Hugging Face hub it has no revision {revision}", "Leave it out") from error
    except errors.RepositoryNotFoundError as error:
        advice = "A private one needs `hf auth login`"
        raise Unreachable(name, "it is neither a file here nor a model on the Hugging Face hub", advice) from error
    except errors.HFValidationError as error:
        raise InputError(f"{name} is no name on the Hugging Face hub: {first_line(error)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable(name, "HF_HUB_OFFLINE is set, so nothing is fetched", command) from error
    except OSError as error:
        if not isinstance(error, ConnectionError | errors.LocalEntryNotFoundError):
            raise InputError(f"{name} cannot be kept in the hub's cache (HF_HOME): {error}") from error
        raise Unreachable(name, f"the Hugging Face hub is out of reach ({first_line(error)})", command) from error
    except Exception as error:  # the HTTP client's own errors, which differ between versions of it
        raise Unreachable(name, f"the Hugging Face hub is out of reach ({first_line(error)})", command) from error
    if found is None:
        raise InputError(f"{name} on the Hugging Face hub has none of {', '.join(NAMES)}")
    return found


def cached_repository(name: str) -> Path | None:
    """The folder of a repository in the hub's cache, if its weights are there, and its config or that it has none."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    revision = revision or None
    here = [huggingface_hub.try_to_load_from_cache(repository, each, revision=revision) for each in (CONFIG, *NAMES)]
    weights = [Path(path) for path in here[1:] if isinstance(path, str)]
    return weights[0].parent if weights and here[0] is not None else None


def _download(repository: str, revision: str | None, cache: Path | None = None) -> Path | None:
    """The folder with the weights of a repository, None if it has none."""
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(file: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, cache_dir=cache))
        except errors.RemoteEntryNotFoundError:
            return None

    try:
        # First: weights without it would be fed and named as if there were none.
        config = fetch(CONFIG)
        found = next(filter(None, map(fetch, NAMES)), None)
    except OSError as error:
        if cache is not None or error.errno not in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        print(f"the hub's cache cannot be written ({error}): {repository} is fetched and not kept", file=sys.stderr)
        return _download(repository, revision, process_folder() / "hub")
    if found and config and config.parent != found.parent:
        raise ConnectionError("it changed while it was fetched; try again")
    return found and found.parent


def check_push(name: str) -> None:
    """Raises InputError unless somebody is logged in who could push OWNER/NAME to the hub."""
    import huggingface_hub

    if not is_hub_name(name) or "@" in name:
        raise InputError(f"--push is {name!r}, and should be OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise InputError(
            "--push needs a token of the Hugging Face hub: `hf auth login`, or HF_TOKEN in the environment"
        )


def push_folder(folder: Path, name: str) -> str:
    """Uploads a folder as the model OWNER/NAME, and returns its address.

    Raises:
        InputError: nobody is logged in, or the hub refuses it or is out of reach.
    """
    import huggingface_hub

    check_push(name)
    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Model of tnt_jax")
    except Exception as error:  # the HTTP client's own errors, which differ between versions of it
        raise InputError(f"{name} cannot be pushed to the Hugging Face hub: {first_line(error)}") from error
    return str(address)


def weights_file(folder: Path) -> Path | None:
    """The file of weights in a folder: called as on the hub, or else the only one that there is."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    found = [path for path in sorted(folder.glob("*")) if path.name.lower().endswith(SUFFIXES) and path.is_file()]
    return found[0] if len(found) == 1 else None


def read_timm_config(folder: Path) -> dict[str, Any] | None:
    """timm's `config.json`, with what older releases put at its top moved to `pretrained_cfg`; None if there is none.

    Raises:
        InputError: it is damaged, or is of another architecture.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} is damaged: it is no JSON object")
    if "architecture" not in fields:
        kind = fields.get("model_type") or ", ".join(map(str, fields.get("architectures") or [])) or "unknown"
        raise InputError(f"{folder} holds a model of another architecture: {kind}; this package has TNT and PyramidTNT")
    if "pretrained_cfg" not in fields:
        fields = {**fields, "pretrained_cfg": fields}
    name = fields["architecture"]
    if not isinstance(name, str) or name not in VARIANTS:
        raise InputError(
            f"{folder} holds a model of another architecture: {name}; this package has {', '.join(VARIANTS)}"
        )
    if not isinstance(fields["pretrained_cfg"], dict):
        raise InputError(f"{path} is damaged: pretrained_cfg is no JSON object")
    return fields


def open_hub_folder(
    folder: Path,
    *,
    weights: Literal["raw", "ema"] | None = None,
    source: Mapping[str, Any] | None = None,
    published: bool = False,
) -> Opened:
    """The model in a folder as the hub has it.

    Raises:
        InputError: there are no weights, they are of another architecture than `config.json` says, or one of both
            is damaged.
    """
    fields, path = read_timm_config(folder), weights_file(folder)
    if path is None:
        raise InputError(f"{folder} has no weights: none of {', '.join(NAMES)}, and not exactly one other checkpoint")
    size, sizes = _input_size(fields), {} if fields is None else timm_sizes(fields, folder)
    opened = open_checkpoint(path, weights=weights, image_size=size, sizes=sizes, source=source, published=published)
    if fields is None:
        return opened
    said, config = VARIANTS[fields["architecture"]].config, opened.description.config
    same = said.name == config.name or opened.described or len(sizes) > 1
    if said.architecture != config.architecture or not same:
        raise InputError(f"{path} holds {config.name}, and {folder / CONFIG} says {said.name}")
    return dataclasses.replace(opened, description=_described(opened.description, fields, folder))


def timm_sizes(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The name of the architecture and the sizes that differ from it, from the arguments with which timm built it.

    They are what `publish` writes. Neither heads nor pooling show in the shapes of tensors.

    Raises:
        InputError: an argument that changes the network in a way that this package does not have.
    """
    base = VARIANTS[fields["architecture"]].config
    if base.architecture == "pyramid":  # which timm has not
        return {}
    pools = [part["global_pool"] for part in (fields, fields["pretrained_cfg"]) if part.get("global_pool") is not None]
    arguments, ours = fields.get("model_args") or {}, {theirs: name for name, theirs in TIMM_ARGUMENTS.items()}
    if not isinstance(arguments, Mapping):
        raise InputError(f"{folder / CONFIG} is damaged: model_args is no JSON object")
    fixed = _TIMM_FIXED | {"legacy": base.architecture == "legacy"}
    sizes: dict[str, Any] = {"name": base.name}
    for name, value in [*(("global_pool", pool) for pool in pools), *arguments.items()]:
        value = plain(value)
        if name in ours:
            square = name != "img_size" and isinstance(value, tuple) and len(set(value)) == 1
            value = value[0] if square else value
            sizes |= {ours[name]: value} if value != getattr(base, ours[name]) else {}
        elif name not in _TIMM_TRAINING and (name not in fixed or value != fixed[name]):
            right = f", and this package has {fixed[name]} alone" if name in fixed else ", which this package has not"
            raise InputError(f"{folder / CONFIG}: timm built this model with {name}={value}{right}")
    # Shapes say these two, and an image size of two numbers is read above.
    return {name: value for name, value in sizes.items() if name not in ("image_size", "in_channels")}


def _input_size(fields: Mapping[str, Any] | None) -> tuple[int, int] | None:
    size = plain((fields or {}).get("pretrained_cfg", {}).get("input_size"))
    return size[1:] if isinstance(size, tuple) and len(size) == 3 and all(type(side) is int for side in size) else None


def _described(known: ModelDescription, fields: Mapping[str, Any], folder: Path) -> ModelDescription:
    """The description with what `config.json` says of inputs and classes, as timm reads it."""
    feeding = fields["pretrained_cfg"]
    if feeding.get("crop_mode", "center") != "center":
        raise InputError(
            f"{folder / CONFIG}: crop_mode is {feeding['crop_mode']}, and this package cuts out the centre"
        )
    preprocessing = dataclasses.replace(
        known.preprocessing,
        crop=plain(feeding.get("crop_pct", known.preprocessing.crop)),
        mean=plain(feeding.get("mean", known.preprocessing.mean)),
        std=plain(feeding.get("std", known.preprocessing.std)),
        interpolation=feeding.get("interpolation", known.preprocessing.interpolation),
    )
    try:
        names = named_classes(fields.get("label_names") or feeding.get("label_names") or feeding.get("labels"))
        names = names if names and len(names) == known.config.num_classes else known.class_names
        described = describe(
            known.config, class_names=names, source=known.source, preprocessing=preprocessing, outputs=known.outputs
        )
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    return described
