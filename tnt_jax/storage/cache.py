"""The files that were fetched from addresses, under the user's cache.

    downloads/ADDRESS/FILE       what lay at an address, with `.record.json`: the address, the size and the SHA-256

Files of the Hugging Face hub lie in the hub's own cache (`HF_HOME`).
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from tnt_jax.config import InputError
from tnt_jax.storage.files import remove, write_text
from tnt_jax.user_cache import cache_path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """A small JSON file of this cache. One that is missing or damaged is as an empty one."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def write_record(path: Path, fields: dict[str, Any]) -> None:
    """Writes what `read_record` reads. Raises OSError."""
    write_text(path, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")


@dataclasses.dataclass(frozen=True)
class Kept:
    """Something in the cache."""

    kind: str
    """`file` or `unfinished`."""
    name: str
    """The address."""
    path: Path
    size: int
    """Bytes."""


def kept() -> list[Kept]:
    """Everything in the cache but the hub's own."""
    found = []
    for folder in sorted((cache_path() / "downloads").glob("*")):
        whole, part = read_record(folder / ".record.json"), read_record(folder / ".unfinished.json")
        if whole or (folder / ".unfinished").exists():
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            name = str((whole or part).get("address", folder.name))
            found.append(Kept("file" if whole else "unfinished", name, folder, size))
    return found


def clear(name: str | None = None) -> list[Kept]:
    """Removes everything, or what has `name` in its address, from the cache, and says what it was.

    Raises:
        InputError: nothing is called so, or it cannot be removed.
    """
    chosen = [each for each in kept() if name is None or name in each.name]
    if name is not None and not chosen:
        raise InputError(f"nothing in {cache_path()} is called {name!r}")
    try:
        for each in chosen:
            remove(each.path)
    except OSError as error:
        raise InputError(f"{cache_path()} cannot be cleared: {error}") from error
    return chosen
