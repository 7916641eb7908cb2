"""A file from an address: kept, resumed where it broke off, checked, and fetched once by several processes.

Under the user's cache, `downloads/ADDRESS/FILE` is what lay at an address, beside `.record.json`: the address, the size
and the SHA-256. Files of the Hugging Face hub lie in the hub's own cache (`HF_HOME`).
"""

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import filelock

from tnt_jax.config import InputError
from tnt_jax.storage.files import remove, write_text
from tnt_jax.storage.torch.formats import what_it_is
from tnt_jax.user_cache import UnsafeCacheError, cache_folder, cache_path, process_folder

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
TRIES = 5  # in a row that bring nothing
LONGEST_WAIT = 30.0  # seconds between two tries, whatever the server asks for
OFFLINE = "HF_HUB_OFFLINE"
PART = ".unfinished"  # the file while it is fetched; what begins with a dot is ours
HASHED_HOSTS = ("download.openmmlab.com", "download.pytorch.org")
"""Whose files have the first digits of their SHA-256 at the end of their names. Elsewhere these may be a date."""
_DIGITS = re.compile(r"-([0-9a-f]{8,64})(?:\.pth|\.pt|\.bin|\.tar|\.safetensors|\.ckpt)+$")


class Unreachable(InputError):
    """A place did not give its file. Another place may."""

    def __init__(self, place: str, why: str, advice: str):
        super().__init__(f"{place} cannot be fetched: {why}. {advice}")
        self.why = why


def without_secrets(address: str) -> str:
    """An address without what may be secret in it: user, password, query and fragment."""
    scheme, _, rest = re.split(r"[?#]", address, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def download(address: str) -> Path:
    """The file at an address, from the cache if it is there.

    Where the cache cannot be written the file goes to a folder of this process, which is said.

    Raises:
        Unreachable: it does not give the file, or this is offline; what came is a web page, or is not what the digits
            in its name say. The message has the command for another machine.
        InputError: it is no address, or the disk is full.
    """
    request, key = _request(address), _key(address)
    try:
        folder = cache_folder() / "downloads" / key
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, UnsafeCacheError) as error:
        _say(f"the cache cannot be written ({error}): {without_secrets(address)} is fetched and not kept")
        folder = process_folder() / key
        folder.mkdir(exist_ok=True)
    if found := _complete(folder):
        return found
    if os.environ.get(OFFLINE, "").lower() in ("1", "true", "yes", "on"):
        raise _unreachable(address, f"{OFFLINE} is set, so nothing is fetched")
    try:
        # Of several processes one fetches, and the others wait for it.
        with filelock.FileLock(folder / ".lock"):
            return _complete(folder) or _fetch(address, request, folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(folder / PART)
        raise InputError(f"{without_secrets(address)} cannot be kept in {folder}: {error.strerror or error}") from error


def cached_file(address: str) -> Path | None:
    """The file of an address in the cache, if it is there."""
    return _complete(cache_path() / "downloads" / _key(address))


def _key(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def _request(address: str) -> urllib.request.Request:
    """Raises InputError if this is no address."""
    try:
        parts = urllib.parse.urlsplit(address)
        if not parts.hostname or "@" in parts.netloc or re.search(r"[\x00-\x1f\x7f]", urllib.parse.unquote(address)):
            raise ValueError
        host = parts.netloc.encode("idna").decode()
        path, query = (urllib.parse.quote(text, safe="%/:=&?~#+!$,;'@()*[]") for text in (parts.path, parts.query))
        quoted = parts._replace(netloc=host, path=path, query=query, fragment="").geturl()
        return urllib.request.Request(quoted, headers={"User-Agent": "tnt_jax", "Accept-Encoding": "identity"})
    except ValueError:
        raise InputError(
            f"{without_secrets(address)!r} is no address that is fetched; one is https://HOST/PATH/FILE, without a user"
        ) from None


def _unreachable(address: str, why: str) -> Unreachable:
    shown = without_secrets(address)
    return Unreachable(shown, why, f"On a machine that reaches it: curl -LO {shown}, and then give the file itself")


def _complete(folder: Path) -> Path | None:
    fields = read_record(folder / ".record.json")
    path = folder / Path(str(fields.get("file", ""))).name
    return path if path.is_file() and path.stat().st_size == fields.get("size") else None


def _fetch(address: str, request: urllib.request.Request, folder: Path) -> Path:
    """Fetches a file into a folder, beginning where an earlier try ended."""
    part, notes = folder / PART, folder / f"{PART}.json"
    failures = 0
    while True:
        before, wait = part.stat().st_size if part.exists() else 0, None
        try:
            _receive(address, request, part, notes)
            return _finished(address, part, notes, folder)
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # it does not fit what is there now
                remove(part)
                continue
            if error.code < 500 and error.code not in (408, 425, 429):
                raise _unreachable(address, f"it answers {error.code} ({error.reason})") from error
            reason, wait = error, error.headers.get("Retry-After")
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            reason = error
        except InputError:
            remove(part)
            remove(notes)
            raise
        failures = 0 if part.exists() and part.stat().st_size > before else failures + 1
        if failures == TRIES or _is_final(reason):
            raise _unreachable(address, str(getattr(reason, "reason", "") or reason) or type(reason).__name__)
        asked = float(wait) if wait and wait.isdigit() else min(2.0**failures, 8.0) / 4
        time.sleep(min(asked, LONGEST_WAIT))


def _is_final(error: Exception) -> bool:
    """True if trying again is of no use: no such host, or nobody listens."""
    return isinstance(getattr(error, "reason", None), socket.gaierror | ConnectionRefusedError)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to what anybody on the way can change."""

    def redirect_request(self, request, answer, code, message, headers, address):
        if not address.lower().startswith(("https://", "http://" if request.type == "http" else "https://")):
            raise _unreachable(request.full_url, f"it leads to {without_secrets(address)}, which is not https")
        return super().redirect_request(request, answer, code, message, headers, address)


def open_request(request: urllib.request.Request):
    """The answer to a request, a context."""
    return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)


def _receive(address: str, request: urllib.request.Request, part: Path, notes: Path) -> None:
    """Adds to a part what it lacks, or writes it anew where the server has another file now or gives no ranges."""
    known, start = read_record(notes), part.stat().st_size if part.exists() else 0
    if start and start == known.get("size"):
        return
    for name in ("Range", "If-range"):  # of an earlier try
        request.remove_header(name)
    if start and known.get("version"):
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", known["version"])
    shown = without_secrets(address)
    with open_request(request) as answer:
        resumed = answer.status == 206 and str(answer.headers.get("Content-Range", "")).startswith(f"bytes {start}-")
        start = start if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if version and version.startswith("W/"):
            version = answer.headers.get("Last-Modified")  # a weak tag says nothing of single bytes
        write_record(notes, {"address": shown, "version": version, "size": total})
        size = f" ({total / 1e6:,.0f} MB)" if total else ""
        _say(f"fetching {shown.rpartition('/')[2]}{size}" + (f", from byte {start:,} on" if start else ""))
        with part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read1(CHUNK):
                if not start and file.tell() == 0:
                    _refuse_pages(address, answer.headers.get("Content-Type", ""), chunk)
                file.write(chunk)
            size = file.tell()
    if total is not None and size < total:
        raise ConnectionError(f"it broke off after {size:,} of {total:,} bytes")


def _refuse_pages(address: str, kind: str, start: bytes) -> None:
    if kind.startswith("text/html") or "web page" in what_it_is(start[:1024]):
        raise _unreachable(address, "it gives a web page, not a checkpoint; look for the address of the file itself")


def _finished(address: str, part: Path, notes: Path, folder: Path) -> Path:
    """Checks what was fetched and gives it its name."""
    parts, digest = urllib.parse.urlsplit(address), file_sha256(part)
    name = Path(urllib.parse.unquote(parts.path)).name.lstrip(".")[-200:] or "download"
    expected = _DIGITS.search(name) if parts.hostname in HASHED_HOSTS else None
    if expected and not digest.startswith(expected[1]):
        wrong = digest[: len(expected[1])]
        raise _unreachable(
            address, f"its SHA-256 should begin with {expected[1]}, as its name says, and begins with {wrong}"
        )
    path = part.replace(folder / name)
    size, shown = path.stat().st_size, without_secrets(address)
    write_record(folder / ".record.json", {"address": shown, "file": path.name, "size": size, "sha256": digest})
    remove(notes)
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
class CacheEntry:
    """Something in the cache."""

    kind: str
    """`file` or `unfinished`."""
    name: str
    """The address."""
    path: Path
    size: int
    """Bytes."""


def cache_entries() -> list[CacheEntry]:
    """Everything in the cache but the hub's own."""
    found = []
    for folder in sorted((cache_path() / "downloads").glob("*")):
        whole, part = read_record(folder / ".record.json"), read_record(folder / ".unfinished.json")
        if whole or (folder / ".unfinished").exists():
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            name = str((whole or part).get("address", folder.name))
            found.append(CacheEntry("file" if whole else "unfinished", name, folder, size))
    return found


def clear_cache(name: str | None = None) -> list[CacheEntry]:
    """Removes everything, or what has `name` in its address, from the cache, and says what it was.

    Raises:
        InputError: nothing is called so, or it cannot be removed.
    """
    chosen = [each for each in cache_entries() if name is None or name in each.name]
    if name is not None and not chosen:
        raise InputError(f"nothing in {cache_path()} is called {name!r}")
    try:
        for each in chosen:
            remove(each.path)
    except OSError as error:
        raise InputError(f"{cache_path()} cannot be cleared: {error}") from error
    return chosen
