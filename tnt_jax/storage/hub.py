"""Repositories of the Hugging Face hub, through `huggingface_hub`, which keeps what it has fetched (`HF_HOME`)."""

import errno
import re
import sys
from pathlib import Path

from tnt_jax.config import InputError
from tnt_jax.storage.download import Unreachable
from tnt_jax.storage.files import first_line
from tnt_jax.storage.hub_folder import CONFIG, NAMES
from tnt_jax.user_cache import process_folder

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
    if found := kept_repository(name):
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


def kept_repository(name: str) -> Path | None:
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
