"""A file from an address: kept, resumed where it broke off, checked, and fetched once by several processes."""

import errno
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import filelock

from tnt_jax.config import InputError
from tnt_jax.storage.cache import address_folder, cache_root, read_record, temporary_folder, write_record
from tnt_jax.storage.files import remove
from tnt_jax.storage.torch.formats import what_it_is

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
TRIES = 5  # in a row that bring nothing
MIRROR = "TNT_JAX_MIRROR"
OFFLINE = "HF_HUB_OFFLINE"
_DIGITS = re.compile(r"-([0-9a-f]{8,64})(?:\.pth|\.pt|\.bin|\.tar|\.safetensors|\.ckpt)+$")


class Unreachable(InputError):
    """An address did not give its file. Another address may."""


class WrongContent(Unreachable):
    """An address gave something else than its file."""


def download(address: str) -> Path:
    """The file at an address, from the cache if it is there.

    The environment variable `TNT_JAX_MIRROR` names a server that has `HOST/PATH` of every address and is asked first.
    Where the cache cannot be written the file goes to a temporary folder, which is said.

    Raises:
        Unreachable: nobody gives the file, or this is offline; the message has the command for another machine.
        InputError: what came is a web page, or is not what the digits in its name say, or the disk is full.
    """
    if not urllib.parse.urlsplit(address).hostname:
        raise InputError(f"{address} is no address; one is https://HOST/PATH/FILE")
    folder = address_folder(address)
    if found := _complete(folder):
        return found
    if os.environ.get(OFFLINE, "").lower() in ("1", "true", "yes", "on"):
        raise Unreachable(_missing(address, f"{OFFLINE} is set, so nothing is fetched"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        with _held(lock, address):
            return _complete(folder) or _fetch_from_any(address, folder)
    except (PermissionError, NotADirectoryError) as error:
        return _without_keeping(address, error)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.ENOTDIR):
            return _without_keeping(address, error)
        raise InputError(f"{address} cannot be kept in {folder}: {error}") from error


def _without_keeping(address: str, error: OSError) -> Path:
    _say(f"{cache_root()} cannot be written ({error.strerror}): {address} is fetched and not kept")
    return _fetch_from_any(address, temporary_folder())


def _complete(folder: Path) -> Path | None:
    fields = read_record(folder / ".record.json")
    path = folder / str((fields or {}).get("file", ""))
    return path if fields and path.is_file() and path.stat().st_size == fields.get("size") else None


def _held(lock: filelock.FileLock, address: str) -> filelock.FileLock:
    try:
        lock.acquire(timeout=0)
        lock.release()
    except filelock.Timeout:
        _say(f"another process is fetching {address}; waiting for it")
    return lock


def _fetch_from_any(address: str, folder: Path) -> Path:
    errors = []
    for place in _places(address):
        try:
            return _fetch(address, place, folder)
        except Unreachable as error:
            errors.append(error)
    if len(errors) == 1 and isinstance(errors[0], WrongContent):
        raise errors[0]
    raise Unreachable(_missing(address, "; ".join(map(str, errors))))


def _places(address: str) -> Iterator[str]:
    if mirror := os.environ.get(MIRROR):
        yield mirror.rstrip("/") + "/" + address.partition("://")[2]
    yield address


def _fetch(address: str, place: str, folder: Path) -> Path:
    """Fetches a file into a folder, beginning where an earlier try ended."""
    # What begins with a dot is ours.
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name.lstrip(".") or "download"
    part, notes = folder / ".unfinished", folder / ".unfinished.json"
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive(address, place, part, notes)
            break
        except (urllib.error.HTTPError, urllib.error.URLError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 416 and before:
                remove(part)  # it does not fit what is there now
                continue
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise Unreachable(f"{place} answers {error.code} ({error.reason})") from error
            reason = error
        except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            reason = error
        except InputError:
            remove(part)
            remove(notes)
            raise
        except OSError as error:
            remove(part)
            remove(notes)
            raise InputError(f"{place} cannot be written to {folder}: {error.strerror or error}") from error
        failures = 0 if part.exists() and part.stat().st_size > before else failures + 1
        if failures == TRIES or _is_final(reason):
            why = getattr(reason, "reason", None) or str(reason) or repr(reason)
            raise Unreachable(f"{place} cannot be reached ({why})")
        time.sleep(min(2.0**failures, 8.0) / 4)
    return _finished(address, part, notes, folder / name)


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use: no such host, or nobody listens."""
    return isinstance(getattr(error, "reason", None), socket.gaierror | ConnectionRefusedError)


def _receive(address: str, place: str, part: Path, notes: Path) -> None:
    """Adds to a part what it lacks, or writes it anew where the server has another file now or gives no ranges."""
    known, start = read_record(notes) or {}, part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tnt_jax", "Accept-Encoding": "identity"}
    if start and known.get("place") == place and known.get("version"):
        headers |= {"Range": f"bytes={start}-", "If-Range": known["version"]}
    if start and start == known.get("size"):
        return
    with urllib.request.urlopen(urllib.request.Request(place, headers=headers), timeout=TIMEOUT) as answer:
        resumed = answer.status == 206 and str(answer.headers.get("Content-Range", "")).startswith(f"bytes {start}-")
        start = start if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if version and version.startswith("W/"):
            version = answer.headers.get("Last-Modified")  # a weak tag says nothing of single bytes
        fields = {"address": address, "place": place, "version": version, "size": total}
        notes.write_text(json.dumps(fields), encoding="utf-8")
        with part.open("ab" if resumed else "wb") as file, _Progress(Path(address).name, total, start) as advance:
            while chunk := answer.read1(CHUNK):
                if not start and file.tell() == 0:
                    _refuse_pages(place, answer.headers.get("Content-Type", ""), chunk)
                file.write(chunk)
                advance(len(chunk))
            size = file.tell()
    if total is not None and size < total:
        raise ConnectionError(f"it broke off after {size:,} of {total:,} bytes")


def _refuse_pages(place: str, kind: str, start: bytes) -> None:
    if kind.startswith("text/html") or "web page" in what_it_is(start[:1024]):
        raise WrongContent(f"{place} gives a web page, not a checkpoint; look for the address of the file itself")


def _finished(address: str, part: Path, notes: Path, path: Path) -> Path:
    """Checks what was fetched and gives it its name."""
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    expected = _DIGITS.search(path.name)
    if expected and not digest.startswith(expected[1]):
        remove(part)
        remove(notes)
        raise WrongContent(
            f"{address} is not what its name says: its SHA-256 begins with {digest[: len(expected[1])]}, and should "
            f"with {expected[1]}; what was fetched is removed"
        )
    part.replace(path)
    size = path.stat().st_size
    write_record(path.parent / ".record.json", {"address": address, "file": path.name, "size": size, "sha256": digest})
    remove(notes)
    return path


def _missing(address: str, why: str) -> str:
    from tnt_jax.storage.cache import kept

    there = [each.name for each in kept() if each.kind != "unfinished"]
    return (
        f"{address} cannot be fetched: {why}. In {cache_root()} "
        + (f"there are {', '.join(there)}" if there else "there is nothing")
        + f". On a machine that reaches it: curl -LO {address}, and then give the file itself"
    )


class _Progress:
    """A bar with size and rate on a terminal, elsewhere one line; a context that gives the function to advance it."""

    def __init__(self, name: str, total: int | None, done: int):
        self.name, self.total, self.done, self.bar = name, total, done, None

    def __enter__(self):
        if not sys.stderr.isatty():
            size = f" ({self.total / 1e6:,.0f} MB)" if self.total else ""
            _say(f"fetching {self.name}{size}" + (f", from byte {self.done:,} on" if self.done else ""))
            return lambda count: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.bar.start()
        task = self.bar.add_task(self.name, total=self.total, completed=self.done)
        return lambda count: self.bar.advance(task, count)

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
