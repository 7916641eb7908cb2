"""What was fetched and converted, under the user's cache: `$XDG_CACHE_HOME/tnt_jax`, or `~/.cache/tnt_jax`.

    downloads/ADDRESS/FILE       what lay at an address, with `.record.json`: the address, the size and the SHA-256
    models/SHA256-DESCRIPTION/   the model folder that was made of a file, by both
    sources/NAME.json            which of these an address or a name on the hub became

Files of the Hugging Face hub lie in the hub's own cache (`HF_HOME`).
"""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

from tnt_jax.config import InputError
from tnt_jax.storage.files import remove, write_whole

_TEMPORARY = "tnt_jax-fetched-"


def cache_root() -> Path:
    """The folder that all of this lies in. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tnt_jax"


def address_folder(address: str) -> Path:
    """Where the file of an address is kept."""
    return cache_root() / "downloads" / hashlib.sha256(address.encode()).hexdigest()[:16]


def models_folder() -> Path:
    """Where the models are kept that were made of files."""
    return cache_root() / "models"


def model_folder(sha256: str, description: str) -> Path:
    """Where the model is kept that was made of a file: the file may say different things of it, or hold two."""
    return models_folder() / f"{sha256}-{zlib.crc32(description.encode()):08x}"


def temporary_folder() -> Path:
    """A folder for what cannot be kept."""
    return Path(tempfile.mkdtemp(prefix=_TEMPORARY))


def forget_temporary(path: Path) -> None:
    """Removes the folder that a file lies in, or the folder, if it is one of `temporary_folder`."""
    for folder in (path, *path.parents):
        if folder.name.startswith(_TEMPORARY) and folder.parent == Path(tempfile.gettempdir()):
            remove(folder)


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded(source: str) -> dict[str, Any] | None:
    """What is known of an address or a name on the hub that was fetched before."""
    return read_record(_source_file(source))


def record(source: str, fields: dict[str, Any]) -> None:
    """Remembers what an address or a name on the hub became.

    Raises:
        InputError: the cache cannot be written.
    """
    write_record(_source_file(source), {"source": source, **fields})


def _source_file(source: str) -> Path:
    name = re.sub(r"[^\w.@-]+", "--", source)[-80:]
    return cache_root() / "sources" / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}.json"


def read_record(path: Path) -> dict[str, Any] | None:
    """A small JSON file of this cache. One that is damaged is as none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return fields if isinstance(fields, dict) else None


def write_record(path: Path, fields: dict[str, Any]) -> None:
    """Writes what `read_record` reads.

    Raises:
        InputError: it cannot be written.
    """
    text = json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Kept:
    """Something in the cache."""

    kind: str
    """`file`, `unfinished` or `model`."""
    name: str
    """The address, or what the model is."""
    path: Path
    size: int
    """Bytes."""


def kept() -> list[Kept]:
    """Everything in the cache but the hub's own."""
    found, root = [], cache_root()
    for folder in sorted((root / "downloads").glob("*")):
        fields = read_record(folder / ".record.json") or read_record(folder / ".unfinished.json") or {}
        kind = "file" if (folder / ".record.json").exists() else "unfinished"
        found.append(Kept(kind, str(fields.get("address", folder.name)), folder, _size(folder)))
    sources: dict[str, list[str]] = {}
    for path in sorted((root / "sources").glob("*.json")):
        fields = read_record(path) or {}
        sources.setdefault(str(fields.get("model")), []).append(str(fields.get("source", path.name)))
    for folder in sorted((root / "models").glob("*")):
        if not folder.name.startswith("."):
            found.append(Kept("model", ", ".join(sources.get(folder.name, [])) or folder.name, folder, _size(folder)))
    return found


def clear(name: str | None = None) -> list[Kept]:
    """Removes everything, or what has `name` in its address or name, from the cache, and says what it was.

    Raises:
        InputError: nothing is called so, or it cannot be removed.
    """
    chosen = [each for each in kept() if name is None or name in each.name]
    if name is not None and not chosen:
        raise InputError(f"nothing in {cache_root()} is called {name!r}")
    try:
        for each in chosen:
            remove(each.path)
        gone = {each.path.name for each in chosen}
        for path in (cache_root() / "sources").glob("*.json"):
            if name is None or (read_record(path) or {}).get("model") in gone:
                remove(path)
    except OSError as error:
        raise InputError(f"{cache_root()} cannot be cleared: {error}") from error
    return chosen


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
