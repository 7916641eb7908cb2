"""Files and folders that appear when they are complete, or not at all."""

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tnt_jax.config import InputError
from tnt_jax.storage.places import BucketPath, is_bucket

UNFINISHED = ".unfinished-"
"""In the name of the folder, beside a destination, in which it is made."""


def check_ending(path: str | os.PathLike, endings: Sequence[str], what: str) -> None:
    """Raises InputError unless a file ends in one of these and its folder is there."""
    if Path(path).suffix not in endings:
        raise InputError(f"{path}: {what} ends in {' or '.join(endings)}")
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}")


def write_whole(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Has `write` make a file or folder, which takes the place of `path` when it is complete and on the disk.

    A folder that was there is renamed away before, and removed after. Where `path` is a link, what it leads to is
    replaced.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
        _replace(path, write)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def write_text(path: Path | BucketPath, text: str) -> None:
    """Replaces a file in one step that no crash comes between. Raises OSError."""
    if is_bucket(path):  # an object appears as a whole
        path.write_text(text)
        return
    _replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def append(path: Path | BucketPath, text: str) -> None:
    """Adds to a small file. Raises OSError."""
    if is_bucket(path):  # which has no appending
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def _replace(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    path = Path(path).resolve()
    # Of a name that nobody can guess, and no other container has: there every process may have the number 1.
    made = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}{UNFINISHED}", dir=path.parent))
    unfinished, replaced = made / path.name, made / "replaced"
    try:
        write(unfinished)
        _flush(unfinished)
        if path.is_dir():
            path.rename(replaced)
        unfinished.replace(path)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(made, ignore_errors=True)


def _flush(path: Path) -> None:
    """Has the disk write what a file or folder holds, so that its name never outlives a power cut without it."""
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())


def free_space(path: str | os.PathLike) -> int:
    """The bytes that are free where a file or folder is, or is to be."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


def check_space(path: str | os.PathLike, size: int) -> None:
    """Raises InputError if there is no room for as many bytes where a file or folder is to be."""
    if (free := free_space(path)) < size:
        raise InputError(f"{path} cannot be written: it takes {size:,} bytes, and {free:,} are free on the disk")


def may_merge(folder: Path) -> bool:
    """True if Orbax may write what processes merge into one file: it looks for the parts with the path as a pattern.

    Source: orbax/checkpoint/_src/serialization/ocdbt_utils.py, merge_ocdbt_per_process_files.
    """
    return not glob.has_magic(str(folder))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
