"""The place of a run: a folder on a disk, or one in a bucket, `gs://BUCKET/FOLDER`.

A bucket has no appending, no renaming and no locks. What is appended to is made on the disk and sent as a whole
(`Spool`), a checkpoint is complete when Orbax's last object of it is there, and a lock is its holder's heartbeat.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import shutil
import tempfile
import time
import types
from collections.abc import Callable, Sequence

from etils.epath.gpath import PosixGPath

from tnt_jax.config import InputError

COMMITTED = "commit_success.txt"
"""The object that Orbax writes last of a checkpoint in a bucket."""


def is_bucket(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith("gs://")


def place(path: str | os.PathLike) -> "pathlib.Path | BucketPath":
    """The path of something that may lie in a bucket, with pathlib's methods.

    Raises:
        InputError: no bucket can be reached from here.
    """
    if not is_bucket(path):
        return pathlib.Path(path)
    _check_client()
    return BucketPath(os.fspath(path))


@functools.cache
def _check_client() -> None:
    if not importlib.util.find_spec("gcsfs"):
        raise InputError("gs:// needs the client of Google's buckets: pip install 'tnt_jax[bucket]'")
    # Without these it asks for the kind of a bucket each time, and remembers what a folder held.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec
    import google.auth

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it tries again, and what it then raises
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return
    try:
        google.auth.default()
    except Exception as error:  # of many types
        raise InputError(
            "gs:// needs credentials, and there are none: set GOOGLE_APPLICATION_CREDENTIALS to the file of a service "
            "account, or run `gcloud auth application-default login`"
        ) from error


def _as_os_error(method: Callable) -> Callable:
    """A method that raises OSError alone: the client of a bucket raises the errors of four libraries."""

    @functools.wraps(method)
    def called(self, *args, **options):
        try:
            return method(self, *args, **options)
        except OSError as error:
            if error.strerror is None and len(error.args) == 1:  # which our messages show
                error.strerror = str(error)
            raise
        except Exception as error:
            raise OSError(0, f"{type(error).__name__}: {error}") from error

    return called


class BucketPath(PosixGPath):
    """A path in a bucket, as etils has it."""

    exists, is_dir, unlink, rename, read_bytes, write_bytes = (
        _as_os_error(getattr(PosixGPath, name))
        for name in ("exists", "is_dir", "unlink", "rename", "read_bytes", "write_bytes")
    )

    @_as_os_error
    def iterdir(self):
        return list(super().iterdir())

    @_as_os_error
    def stat(self) -> types.SimpleNamespace:
        found = super().stat()
        return types.SimpleNamespace(st_size=found.length, st_mtime=found.mtime)

    @_as_os_error
    def glob(self, pattern: str):
        return list(super().glob(pattern))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def mkdir(self, *args, **options) -> None:
        """Nothing: a folder is there when something is in it, and the client would make a bucket that is missing."""

    @_as_os_error
    def checksums(self) -> dict[str, str]:
        """Those that the store has of each file in a folder, by its path there."""
        import fsspec

        found = fsspec.filesystem("gcs").find(str(self), detail=True)
        return {os.path.relpath(f"gs://{name}", self): info.get("crc32c", "") for name, info in sorted(found.items())}


class Spool:
    """A folder on this disk for files that grow, which are sent to one in a bucket as a whole.

    Args:
        names: of files that an earlier process sent, and that grow on.
    """

    EVERY_SECONDS = 30.0

    def __init__(self, to: BucketPath, names: Sequence[str]):
        self._to, self._sent, self._time = to, {}, time.monotonic()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="tnt_jax-"))
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((to / name).read_bytes())

    def write(self, kind: str, step: int, values: dict) -> None:
        """As a log: sends after each evaluation, and now and then."""
        if kind == "test" or time.monotonic() - self._time > self.EVERY_SECONDS:
            self.send()

    def send(self) -> None:
        """Sends what has changed. Raises OSError."""
        self._time = time.monotonic()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            if self._sent.get(path) != len(content):  # they only grow
                (self._to / path.relative_to(self.folder).as_posix()).write_bytes(content)
                self._sent[path] = len(content)

    def close(self) -> None:
        self.send()
        shutil.rmtree(self.folder, ignore_errors=True)
