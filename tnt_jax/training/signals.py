"""Ctrl-C and SIGTERM, from the first instant of a command to its end, and when a run stops and saves.

While a run starts and compiles there is nothing to lose, and a command ends at once.
While it trains, all processes of the run stop after the same step, which is saved.
Where `train` is called without a command, as in a notebook, signals are left alone until it trains, and a second Ctrl-C
is a KeyboardInterrupt.
Nothing here imports JAX before it is needed.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

# What a command exits with when it was stopped: as shells have it for Ctrl-C, and for a scheduler's SIGTERM "try again
# later" (EX_TEMPFAIL), which a restart policy can tell from a failure.
STOP_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
MAX_COST = 0.05
"""Proportion of the time that steps may wait for checkpoints that are saved by time."""
SECONDS_BETWEEN_QUESTIONS = 5.0
"""Several processes ask each other so often, all after the same step: their clocks differ, and so do their signals."""


class StoppedError(RuntimeError):
    """The run was asked to stop, and has saved where it was."""

    agreed = True  # all processes of a run raise it

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = STOP_CODES[signal_number]


class Signals:
    """The signals that a process has received, and what they do.

    Python runs a signal's handler between two of its own instructions, which compiling keeps it from for minutes. So
    the handlers do nothing, and a thread reads the numbers of the signals as they come.
    """

    def __init__(self, ends_process: bool):
        self._ends_process, self._installed, self._interrupts = ends_process, False, 0
        self.kept: Callable[[], str] = lambda: "nothing was begun"
        """The sentence that says which step is kept if the process ends now."""
        self.before_exit: Callable[[int, str], None] = lambda code, message: None
        """Is told the exit code and the reason before the process ends at once."""
        self.received: list[int] = []
        self._training = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["Signals"]:
        """Listens, in the main thread; in others, where Python takes no signals, nothing ever comes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        previous = {number: signal.signal(number, self._handle) for number in STOP_CODES}
        descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ours,), daemon=True).start()
        self._installed = True
        try:
            yield self
        finally:
            self._installed = False
            signal.set_wakeup_fd(descriptor)
            for number, handler in previous.items():
                signal.signal(number, handler)
            theirs.close()

    def _handle(self, number: int, frame) -> None:
        self._interrupts += number == signal.SIGINT
        if not self._ends_process and self._interrupts > 1:
            raise KeyboardInterrupt

    def _listen(self, ours: socket.socket) -> None:
        with ours:
            while numbers := ours.recv(64):
                for number in numbers:
                    if number in STOP_CODES:
                        self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        again = number in self.received
        self.received.append(number)
        if self._ends_process and (not self._training or (again and number == signal.SIGINT)):
            message = f"stopped by {NAMES[number]}; {self.kept()}"
            self.before_exit(STOP_CODES[number], message)
            print(f"error: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(STOP_CODES[number])
        if not again:
            print("Stopping after this step; Ctrl-C again ends at once, without saving.", flush=True)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """From here on a step is finished and saved first."""
        with contextlib.nullcontext() if self._installed else self.installed():
            self._training = True
            try:
                yield
            finally:
                self._training = False


_active: list[Signals] = []


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """A command listens to the signals of its process inside."""
    with Signals(ends_process=True).installed() as listening:
        _active.append(listening)
        try:
            yield
        finally:
            _active.remove(listening)


def current_signals() -> Signals:
    """Those that a command listens to, or those of a call that no command has made."""
    return _active[-1] if _active else Signals(ends_process=False)


class Pauses:
    """When a run stops and when it saves, the same in all of its processes.

    Args:
        received: the signals of this process, as they come.
        minutes: between checkpoints. They are rarer where the steps would wait for them too long.
        steps: between checkpoints, or None.
        processes: of the run.
    """

    def __init__(self, received: list[int], minutes: float, steps: int | None, processes: int = 1):
        self._received, self._seconds, self._steps, self._processes = received, 60 * minutes, steps, processes
        self._last_save = self._last_question = time.monotonic()
        self._waited, self._saves = 0.0, False
        self._signal: int | None = None
        self._asked = self._asked_last = 0
        self._next_question = 1

    def stop(self) -> int | None:
        """The signal that ends the run, or None. All processes ask after each step and each batch of an evaluation."""
        if self._processes == 1:
            self._signal, self._saves = next(iter(self._received), None), self._is_time(0.0)
            return self._signal
        self._asked += 1
        if self._asked >= self._next_question:
            self._ask_all()
        return self._signal

    def _ask_all(self) -> None:
        import numpy as np
        from jax.experimental import multihost_utils

        now = time.monotonic()
        seconds = (now - self._last_question) / (self._asked - self._asked_last)
        more = int(np.clip(SECONDS_BETWEEN_QUESTIONS / max(seconds, 1e-6), 1, 10_000))
        own = [min(self._received, default=0), self._is_time(2 * more * seconds), more]
        rows = multihost_utils.process_allgather(np.array(own, np.int32)).reshape(self._processes, -1)
        signals = rows[:, 0][rows[:, 0] > 0]  # Ctrl-C before SIGTERM
        self._signal = int(signals.min()) if len(signals) else None
        self._saves, more = bool(rows[0, 1]), int(rows[0, 2])
        self._last_question, self._asked_last, self._next_question = now, self._asked, self._asked + more

    def is_save_due(self, step: int) -> bool:
        """True if a checkpoint is due after this step, of which `stop` was asked."""
        return self._saves or bool(self._steps and step % self._steps == 0)

    def _is_time(self, until_next: float) -> bool:
        seconds = max(self._seconds, self._waited / MAX_COST)
        return time.monotonic() - self._last_save + until_next >= seconds

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A checkpoint is saved inside, for whatever reason."""
        began = time.monotonic()
        yield
        self._last_save = time.monotonic()
        self._waited, self._saves = self._last_save - began, False
