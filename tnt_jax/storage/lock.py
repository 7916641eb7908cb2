"""One run at a time in a folder, on one machine and on a disk that machines share.

The kernel's lock on `run.lock` ends with its process, however that ends. Not every shared disk has such locks, so the
holder also writes a heartbeat into `run.lock.json` every ten seconds. A process that finds the heartbeat of another
machine waits 25 seconds, and takes over if it has not changed. In a bucket there is the heartbeat alone.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable

from tnt_jax.config import InputError
from tnt_jax.storage.files import write_text
from tnt_jax.storage.places import BucketPath, is_bucket, place

BEAT_SECONDS = 10.0
LOCK_FILE, HOLDER_FILE = "run.lock", "run.lock.json"


class RunningError(RuntimeError):
    """Another process holds the folder of a run."""

    exit_code = 75


class RunLock:
    """Holds a run's folder, as a context.

    Args:
        tell: is told when another holder is watched.
        lost: is called, in a thread, when another process has taken the folder.

    Raises:
        RunningError: another process holds it.
        InputError: it cannot be written.
    """

    def __init__(self, run_dir: str | os.PathLike, tell: Callable[[str], None], lost: Callable[[str], None]):
        self._folder = place(run_dir)
        self._tell, self._lost = tell, lost
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "place": _place(), "token": uuid.uuid4().hex}
        self._ended = threading.Event()

    def __enter__(self) -> "RunLock":
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = None if is_bucket(self._folder) else (self._folder / LOCK_FILE).open("w")
        except OSError as error:
            raise InputError(f"cannot write into the run's folder {self._folder}: {error.strerror}") from error
        try:
            self._take()
        except BaseException:
            self._close_file()
            raise
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._keeper.join(BEAT_SECONDS)  # a beat on its way would come back after it was removed
        if self._holder().get("token") == self._me["token"]:
            with contextlib.suppress(OSError):
                (self._folder / HOLDER_FILE).unlink()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def _lock(self) -> bool:
        """True if this process has the kernel's lock; there is none in a bucket, and on some disks."""
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal() from None
        except OSError:
            return False
        return True

    def _take(self) -> None:
        locked, holder = self._lock(), self._holder()
        # On this machine, who holds no lock any more is dead.
        is_dead = holder.get("place") == self._me["place"] and (locked or not _is_alive(holder.get("process")))
        if holder and not is_dead:
            watched = 2.5 * BEAT_SECONDS
            self._tell(f"{_who(holder)} was here last; watching for {watched:.0f} s whether it lives")
            end = time.monotonic() + watched
            while time.monotonic() < end:
                time.sleep(min(1.0, BEAT_SECONDS / 5))
                if self._holder() not in (holder, {}):
                    raise self._refusal()
        self._write(0)
        if not locked:  # of two that come at once, the last to write stays
            time.sleep(min(1.0, BEAT_SECONDS / 5))
            if self._holder().get("token") != self._me["token"]:
                raise self._refusal()

    def _refusal(self) -> RunningError:
        return RunningError(
            f"{self._folder} is being trained by {_who(self._holder())}; wait until that has ended, or take another "
            "--run-dir"
        )

    def _holder(self) -> dict:
        return _holder_of(self._folder)

    def _write(self, beat: int) -> None:
        try:
            write_text(self._folder / HOLDER_FILE, json.dumps(self._me | {"beat": beat}) + "\n")
        except OSError as error:
            raise InputError(f"cannot write into the run's folder {self._folder}: {error.strerror}") from error

    def _keep(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            holder = self._holder()
            if holder and holder.get("token") != self._me["token"]:
                self._lost(f"{_who(holder)} has taken {self._folder} while this process was stopped")
                return
            beat += 1
            with contextlib.suppress(InputError):  # a full disk ends the run elsewhere
                self._write(beat)


def is_held(run_dir: str | os.PathLike) -> bool:
    """True if a process trains in a run's folder: on this machine by its lock, elsewhere by its latest beat."""
    folder = place(run_dir)
    holder = _holder_of(folder)
    if not holder:
        return False
    try:
        if is_bucket(folder) or holder.get("place") != _place():
            return time.time() - (folder / HOLDER_FILE).stat().st_mtime < 2.5 * BEAT_SECONDS
        with (folder / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _holder_of(folder: pathlib.Path | BucketPath) -> dict:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text())
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_alive(process: int | None) -> bool:
    """True if there is a process of this number on this machine."""
    try:
        os.kill(process or 0, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _who(holder: dict) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', 'another host')}"


def _place() -> str:
    """The scope in which process numbers are unique: a start of a machine, and of a container on it."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
