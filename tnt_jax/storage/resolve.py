"""The resolution of a MODEL: the one place that decides it, for every command and function that takes one.

A model folder, the folder of a training run, a published name (ours, mmpretrain's, timm's), OWNER/NAME or
OWNER/NAME@REVISION on the Hugging Face hub, `hf-hub:OWNER/NAME`, `local-dir:FOLDER` of a hub repository, an address of
a checkpoint, or a checkpoint file.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from tnt_jax.config import InputError
from tnt_jax.models.variants import ALIASES, get_variant
from tnt_jax.storage.description import DESCRIPTION
from tnt_jax.storage.download import without_secrets
from tnt_jax.storage.folder import PARAMETERS
from tnt_jax.storage.hub import is_hub_name
from tnt_jax.storage.hub_folder import weights_file
from tnt_jax.storage.places import BucketPath, is_bucket, place
from tnt_jax.storage.run import is_hub_folder, is_run

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
