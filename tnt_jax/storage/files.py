"""Files and folders that appear when they are complete, or not at all."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tnt_jax.config import InputError


def check_ending(path: str | os.PathLike, endings: Sequence[str], what: str) -> None:
    """Raises InputError unless a file ends in one of these and its folder is there."""
    if Path(path).suffix not in endings:
        raise InputError(f"{path}: {what} ends in {' or '.join(endings)}")
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}")


def write_whole(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Has `write` make a file or folder beside `path`, which takes its place when it is complete.

    What was there is renamed away before, and removed after, so that one of the two is always whole.

    Raises:
        InputError: it cannot be written there.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        if path.is_dir():
            path.rename(replaced)
            try:
                unfinished.rename(path)
            except OSError:
                replaced.rename(path)
                raise
        else:
            unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        remove(unfinished)
        if path.exists():
            remove(replaced)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step that no crash comes between. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
