"""Repositories of the Hugging Face hub, through `huggingface_hub`, which keeps what it has fetched (`HF_HOME`)."""

import errno
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tnt_jax.config import InputError
from tnt_jax.storage.cache import temporary_folder
from tnt_jax.storage.download import Unreachable
from tnt_jax.storage.torch.formats import read_index

CONNECT = 10.0  # seconds to wait for a connection
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DESCRIPTION = "model.json"
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_hub_name(text: str) -> bool:
    """Whether this has the form OWNER/NAME or OWNER/NAME@REVISION, such as `timm/tnt_s_patch16_224.in1k`."""
    return _NAME.fullmatch(text) is not None


def fetch_repository(name: str) -> Path:
    """The folder with the weights of OWNER/NAME[@REVISION] and what describes them, from the cache if they are there.

    Raises:
        Unreachable: the hub cannot be reached or has no such repository; the message says what to do.
        InputError: the repository has no weights.
    """
    repository, _, revision = name.partition("@")
    tries = (_fetcher(name, repository, revision or None, only_here=here) for here in (True, False))
    for fetch in tries:
        if found := _fetch_weights(name, fetch):
            return found
    raise InputError(f"{name} on the Hugging Face hub has none of {', '.join(WEIGHTS)}")


def _fetch_weights(name: str, fetch: Callable[[str], Path | None]) -> Path | None:
    for weights in WEIGHTS:
        if found := fetch(weights):
            for shard in read_index(found) if weights.endswith(".index.json") else ():
                if fetch(shard) is None:
                    raise InputError(f"{name} on the Hugging Face hub lacks {shard}, which {weights} names")
            for beside in (CONFIG, DESCRIPTION):
                fetch(beside)
            return found.parent
    return None


def _fetcher(name: str, repository: str, revision: str | None, *, only_here: bool) -> Callable[[str], Path | None]:
    import huggingface_hub
    from huggingface_hub import errors

    elsewhere: dict[str, Path] = {}  # where the hub's cache cannot be written
    if not only_here and (why := _why_unreachable()):  # the library would try for half a minute
        raise Unreachable(_out_of_reach(name, why))

    def fetch(file: str) -> Path | None:
        try:
            options = {"revision": revision, "local_files_only": only_here, **elsewhere}
            return Path(huggingface_hub.hf_hub_download(repository, file, **options))
        except errors.LocalEntryNotFoundError as error:
            if only_here:
                return None
            raise Unreachable(_out_of_reach(name, error)) from error
        except errors.GatedRepoError as error:
            raise Unreachable(
                f"{name} on the Hugging Face hub is gated: ask for access on its page, and log in with `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise Unreachable(f"{repository} on the Hugging Face hub has no revision {revision}") from error
        except errors.RepositoryNotFoundError as error:
            raise Unreachable(
                f"{name} is neither a file here nor a model on the Hugging Face hub (a private one needs "
                "`hf auth login`)"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.HFValidationError as error:
            raise InputError(f"{name} is no name on the Hugging Face hub: {error}") from error
        except OSError as error:
            if elsewhere or only_here or error.errno == errno.ENOSPC:
                raise InputError(f"{name} cannot be kept in the hub's cache (HF_HOME): {error}") from error
            print(f"the hub's cache cannot be written ({error}): {name} is fetched and not kept", file=sys.stderr)
            elsewhere["local_dir"] = temporary_folder()
            return fetch(file)
        except Exception as error:  # the HTTP client's own errors, which differ between versions of it
            raise Unreachable(_out_of_reach(name, error)) from error

    return fetch


def _why_unreachable() -> str | None:
    """Why nobody can be connected to where the hub is, if so. Behind a proxy this cannot be told."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if urllib.request.getproxies():
        return None
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=CONNECT).close()
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
    return None


def _out_of_reach(name: str, error: Exception | str) -> str:
    from huggingface_hub import constants

    first = next(iter(str(error).splitlines()), repr(error))
    return (
        f"{name} is not in {constants.HF_HUB_CACHE}, and the Hugging Face hub is out of reach: {first}. On a machine "
        f"that reaches it: hf download {name.partition('@')[0]} --local-dir FOLDER, and then give local-dir:FOLDER"
    )


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
        first = next(iter(str(error).splitlines()), repr(error))
        raise InputError(f"{name} cannot be pushed to the Hugging Face hub: {first}") from error
    return str(address)
