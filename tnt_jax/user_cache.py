"""The folder in which this package keeps what it fetched and made: `$XDG_CACHE_HOME/tnt_jax`, or `~/.cache/tnt_jax`.

What lies in it is loaded as code and as weights, so only this user may be able to write it.
"""

import functools
import logging
import os
import pathlib
import stat
import tempfile

log = logging.getLogger(__name__)

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UnsafeCacheError(RuntimeError):
    """The folder of the cache belongs to another user."""


def cache_path() -> pathlib.Path:
    """The folder, which need not exist. A user without a home has one among the temporary files, which is said once."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "tnt_jax" if not base.startswith("~") else _of_nobody()


@functools.cache
def _of_nobody() -> pathlib.Path:
    path = pathlib.Path(tempfile.gettempdir()) / f"tnt_jax-{os.getuid()}"
    log.warning("this user has no home folder: the cache is %s; XDG_CACHE_HOME says where else", path)
    return path


def cache_folder() -> pathlib.Path:
    """The folder, made if need be, which only this user can write.

    Raises:
        UnsafeCacheError: it belongs to another user.
        OSError: it cannot be made.
    """
    folder = cache_path()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise UnsafeCacheError(f"{folder} belongs to user {folder.stat().st_uid}, not to user {os.getuid()}")
    if not ours_alone(folder):
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~OTHERS_WRITE)
    return folder


def _is_ours(path: pathlib.Path) -> bool:
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()


def ours_alone(path: pathlib.Path) -> bool:
    """True if no other user but root can have written a file or folder."""
    return _is_ours(path) and not path.stat().st_mode & OTHERS_WRITE


def process_folder() -> pathlib.Path:
    """A folder of this process, which is removed when it ends, for what cannot be kept."""
    return pathlib.Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tnt_jax-")
