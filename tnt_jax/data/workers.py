"""Threads and processes that prepare batches. What they prepare does not depend on how many there are.

A worker process is given its share of the rows of every batch and works ahead as far as its socket lets it.
It ends when its socket does.
Arrays of the source lie in memory that all workers share; it has no name and ends with them.
However the training process dies, nothing is left behind.
"""

import collections
import contextlib
import itertools
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tnt_jax.config import InputError


@runtime_checkable
class Recipe(Protocol):
    """The rows of a batch. Pickled to the worker processes."""

    row_shape: tuple[int, int, int]
    """Height, width and channels of an image."""
    dtype: str
    """Of the images: uint8, uint16 or float32."""
    target_shape: tuple[int, ...]
    """Of the target of an image."""
    target_dtype: str

    def fill(self, step: int, rows: Sequence[int], images: np.ndarray, targets: np.ndarray) -> list[Any]:
        """Writes images and targets of these rows of the batch, and returns what there is to report."""


class WorkerError(RuntimeError):
    """A worker process died or raised something that is not the user's mistake."""


class KilledWorkerError(WorkerError):
    """A worker process was killed by a signal, which another start may not be."""

    exit_code = 75


Filled = tuple[np.ndarray, np.ndarray, list[Any]]  # images, targets, reports
ROWS_PER_TASK = 4
STEPS_AHEAD = 2


def prepare(
    recipe: Recipe, rows: Sequence[int], steps: range, *, num_workers: int, num_threads: int
) -> Iterator[Filled]:
    """These rows of the batch of each step: images, targets, reports.

    Raises:
        InputError, WorkerError: as soon as a worker fails.
    """
    if num_workers:
        return _in_processes(recipe, rows, steps, num_workers, num_threads)
    return _in_threads(recipe, rows, steps, num_threads)


def _empty(recipe: Recipe, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The memory for so many rows of a batch."""
    targets = np.empty((count, *recipe.target_shape), recipe.target_dtype)
    return np.empty((count, *recipe.row_shape), recipe.dtype), targets


def _in_threads(recipe: Recipe, rows: Sequence[int], steps: range, num_threads: int) -> Iterator[Filled]:
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="data")
    pending = collections.deque()
    is_finalizing = sys.is_finalizing  # bound here, since modules are emptied before the last iterators are closed

    def start(step: int) -> None:
        images, targets = _empty(recipe, len(rows))
        parts = [slice(at, at + ROWS_PER_TASK) for at in range(0, len(rows), ROWS_PER_TASK)]
        tasks = [pool.submit(recipe.fill, step, rows[part], images[part], targets[part]) for part in parts]
        pending.append((images, targets, tasks))

    steps = iter(steps)
    try:
        for step in itertools.islice(steps, STEPS_AHEAD):
            start(step)
        while pending:
            images, targets, tasks = pending.popleft()
            reports = [report for task in tasks for report in task.result()]
            for step in itertools.islice(steps, 1):
                start(step)
            yield images, targets, reports
    finally:
        if not is_finalizing():
            pool.shutdown(wait=False, cancel_futures=True)


def _in_processes(
    recipe: Recipe, rows: Sequence[int], steps: range, num_workers: int, num_threads: int
) -> Iterator[Filled]:
    bounds = [round(worker * len(rows) / num_workers) for worker in range(num_workers + 1)]
    shares = [slice(*pair) for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]
    workers = []
    try:
        with _Shared(recipe) as shared:
            for share in shares:
                workers.append(Worker(shared, rows[share], steps, num_threads))
        for _ in steps:
            images, targets = _empty(recipe, len(rows))
            reports = []
            for worker, share in zip(workers, shares, strict=True):
                reports += worker.receive(images[share], targets[share])
            yield images, targets, reports
    finally:
        for worker in workers:
            worker.close()


class _Shared:
    """A recipe for many processes: pickled, but its arrays in one file in memory, which has no name.

    As a context: the file is closed at the end, and lives on in the processes that were started.
    """

    def __init__(self, recipe: Recipe):
        buffers: list[pickle.PickleBuffer] = []
        self.pickled = pickle.dumps(recipe, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        self.lengths = [view.nbytes for view in views]
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("tnt_jax"), "r+b")
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115, closed at the end of the context
        for view in views:
            self._file.write(view)
            self._file.write(bytes(-view.nbytes % ALIGNMENT))
        self._file.flush()
        self.descriptor = self._file.fileno()

    def __enter__(self) -> "_Shared":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    @staticmethod
    def recipe(pickled: bytes, lengths: list[int], descriptor: int) -> Recipe:
        """The recipe in another process."""
        if not lengths:
            return pickle.loads(pickled)
        # Never closed: the arrays are views of it.
        memory = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        starts = itertools.accumulate((length + -length % ALIGNMENT for length in lengths), initial=0)
        views = [memory[at : at + length] for at, length in zip(starts, lengths, strict=False)]
        return pickle.loads(pickled, buffers=views)


ALIGNMENT = 64  # bytes
HEADER = struct.Struct("?Q")  # whether a message or an exception follows, and its length in bytes


class Worker:
    """A worker process, as the training process sees it."""

    def __init__(self, shared: _Shared, rows: Sequence[int], steps: range, num_threads: int):
        self._socket, theirs = socket.socketpair()
        # The package, and a user's own modules, as they are imported here. -P: Python would look into the current
        # folder by itself, before its own library.
        parent = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        code = (
            f"import sys; sys.path[:] = {[*sys.path, parent]!r}\n"
            f"from tnt_jax.data.workers import run_worker; run_worker({theirs.fileno()}, {shared.descriptor})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), shared.descriptor],
                process_group=0,
            )
        # Also when the interpreter ends before the iterator was closed.
        self.close = weakref.finalize(self, _end, self._socket, self._process)
        self._send(pickle.dumps((shared.pickled, shared.lengths, rows, steps, num_threads)))

    def _send(self, order: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `receive` says why it died
            self._socket.sendall(HEADER.pack(True, len(order)) + order)

    def receive(self, images: np.ndarray, targets: np.ndarray) -> list[Any]:
        """Fills in the rows of the next step and returns its reports."""
        try:
            succeeded, length = HEADER.unpack(_receive(self._socket, HEADER.size))
            message = pickle.loads(_receive(self._socket, length))
            if succeeded:
                _receive_into(self._socket, images)
                _receive_into(self._socket, targets)
                return message
        except (EOFError, ConnectionResetError):
            raise self._how_it_died() from None
        raise message

    def _how_it_died(self) -> WorkerError:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return WorkerError("a data worker closed its connection")
        if code < 0:
            memory = "; memory may have run out" if code == -signal.SIGKILL else ""
            return KilledWorkerError(f"a data worker was killed by {signal.Signals(-code).name}{memory}")
        return WorkerError(f"a data worker ended with exit status {code}; what it printed stands above")


def _end(connection: socket.socket, process: subprocess.Popen) -> None:
    connection.close()
    process.kill()
    process.wait()


def _receive(connection: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    _receive_into(connection, np.frombuffer(buffer, np.uint8))
    return buffer


def _receive_into(connection: socket.socket, array: np.ndarray) -> None:
    view = memoryview(array).cast("B")
    while view:
        received = connection.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]


def run_worker(descriptor: int, shared: int) -> None:
    """A worker's main loop: reads the job, then sends a share of a batch for every step.

    Args:
        descriptor: of the socket.
        shared: descriptor of the file with the arrays of the recipe.
    """
    # The training process decides when a run ends, also where a scheduler signals every process of a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection:
        _, length = HEADER.unpack(_receive(connection, HEADER.size))
        order = bytes(_receive(connection, length))
        threading.Thread(target=_exit_with_parent, args=(connection,), daemon=True).start()
        try:
            pickled, lengths, rows, steps, num_threads = pickle.loads(order)
            recipe = _Shared.recipe(pickled, lengths, shared)
            os.close(shared)
            for images, targets, reports in _in_threads(recipe, rows, steps, num_threads):
                message = pickle.dumps(reports)
                connection.sendall(HEADER.pack(True, len(message)) + message)
                connection.sendall(images)
                connection.sendall(targets)
        except BaseException as error:
            if not isinstance(error, InputError):
                error = WorkerError(f"a data worker failed:\n{traceback.format_exc()}")
            message = pickle.dumps(error)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is left to be told
                connection.sendall(HEADER.pack(False, len(message)) + message)


def _exit_with_parent(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)  # returns when the other end is closed, since nothing more is ever sent
    os._exit(0)
