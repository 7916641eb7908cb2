"""Checkpoints on the Hugging Face hub, through `huggingface_hub`, which keeps what it has downloaded."""

import re
from pathlib import Path

from tnt_jax.config import InputError

FILES = ("model.safetensors", "pytorch_model.bin")


def is_hub_name(source: str) -> bool:
    """Whether this has the form OWNER/NAME, such as `timm/tnt_s_patch16_224.in1k`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def download(name: str) -> Path:
    """The checkpoint of a model on the hub, as a local file: safetensors where there is one.

    Raises:
        InputError: the hub cannot be reached, or has no such model or no checkpoint in it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    for file in FILES:
        try:
            return Path(hf_hub_download(name, file))
        except RepositoryNotFoundError as error:
            raise InputError(f"{name} is neither a file here nor a model on the Hugging Face hub") from error
        except LocalEntryNotFoundError as error:
            raise InputError(f"{name} is no file here, and the Hugging Face hub is out of reach: {error}") from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # the HTTP client's own errors, which differ between versions of it
            raise InputError(f"{name} could not be downloaded from the Hugging Face hub: {error}") from error
    raise InputError(f"{name} on the Hugging Face hub has none of {', '.join(FILES)}")
