"""Ctrl-C and SIGTERM, from the first instant of a command to its end.

While a run starts and compiles there is nothing to lose, and a command ends at once.
While it trains, all processes of the run stop after the same step, which is saved.
Where `train` is called without a command, as in a notebook, signals are left alone until it trains, and a second Ctrl-C
is a KeyboardInterrupt.
Nothing here imports JAX before it is needed.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

# What a command exits with when it was stopped: as shells have it for Ctrl-C, and for a scheduler's SIGTERM "try again
# later" (EX_TEMPFAIL), which a restart policy can tell from a failure.
STOP_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppedError(RuntimeError):
    """The run was asked to stop, and has saved where it was."""

    agreed = True  # all processes of a run raise it

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = STOP_CODES[signal_number]


class Signals:
    """What has come, and what is to be done about it.

    Python runs a signal's handler between two of its own instructions, which compiling keeps it from for minutes. So
    the handlers do nothing, and a thread reads the numbers of the signals as they come.
    """

    def __init__(self, ends_process: bool):
        self._ends_process, self._installed, self._interrupts = ends_process, False, 0
        self.kept: Callable[[], str] = lambda: "nothing was begun"
        """What is kept if the process ends now, in words."""
        self.before_exit: Callable[[int, str], None] = lambda code, message: None
        """Is told the exit code and the reason before the process ends at once."""
        self._received: list[int] = []
        self._training, self._several = False, False
        self._polls = 0
        self._other_sigterm: ctypes.Array | None = None

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
        again = number in self._received
        self._received.append(number)
        if self._ends_process and (not self._training or (again and number == signal.SIGINT)):
            message = f"stopped by {NAMES[number]}; {self.kept()}"
            self.before_exit(STOP_CODES[number], message)
            print(f"error: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(STOP_CODES[number])
        if not again:
            print("Stopping after this step; Ctrl-C again ends at once, without saving.", flush=True)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # which is how JAX's service learns of it

    def take_back(self) -> None:
        """SIGTERM ends this process at once again; JAX's service, which has just been started, has taken it."""
        if self._installed:
            self._other_sigterm = _action(signal.SIGTERM)
            signal.signal(signal.SIGTERM, self._handle)

    @contextlib.contextmanager
    def training(self, several: bool) -> Iterator[Callable[[], int | None]]:
        """From here on a step is finished and saved first.

        Args:
            several: whether other processes train too. SIGTERM is JAX's service's then, which has them agree on a step.

        Yields:
            What says, each time that all processes ask, with which signal the run was asked to stop, or None.
        """
        with contextlib.nullcontext() if self._installed else self.installed():
            if self._other_sigterm is not None:
                _action(signal.SIGTERM, self._other_sigterm)
            self._training, self._several = True, several
            try:
                yield self._agreed if several else lambda: self._received[0] if self._received else None
            finally:
                self._training = False

    def _agreed(self) -> int | None:
        import numpy as np
        from jax.experimental import multihost_utils

        self._polls += 1
        if not multihost_utils.reached_preemption_sync_point(self._polls):
            return None
        interrupted = multihost_utils.process_allgather(np.bool_(signal.SIGINT in self._received)).any()
        return signal.SIGINT if interrupted else signal.SIGTERM


def _action(number: int, new: ctypes.Array | None = None) -> ctypes.Array:
    """What the kernel does about a signal, as `sigaction` has it; `new` takes its place."""
    old = ctypes.create_string_buffer(1024)  # more than any system's struct sigaction has
    ctypes.CDLL(None).sigaction(number, new, old)
    return old


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
