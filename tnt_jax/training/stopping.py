"""Ctrl-C and SIGTERM, on which all processes of a run stop after the same step."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
import rich.console
from jax.experimental import multihost_utils

# What a command exits with when it was stopped: as shells have it for Ctrl-C, and for a scheduler's SIGTERM "try again
# later" (EX_TEMPFAIL), which a restart policy can tell from a failure.
STOP_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}

StopSignal = Callable[[int], int | None]
"""Step to the signal with which the run was asked to stop after it, or None."""


class StoppedError(RuntimeError):
    """The run was asked to stop, and has saved where it was."""

    agreed = True  # all processes of a run raise it

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = STOP_CODES[signal_number]


@contextlib.contextmanager
def stop_request(console: rich.console.Console) -> Iterator[StopSignal]:
    """Watches for the signals. A second Ctrl-C interrupts.

    Outside the main thread, where Python takes no signals, nothing asks.
    """
    received = []
    together = jax.process_count() > 1

    def handle(signal_number, frame):
        if received and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal_number)
        console.print("Stopping after this step; Ctrl-C stops at once, without saving.")
        if together:
            os.kill(os.getpid(), signal.SIGTERM)  # which is how JAX's service learns of it

    def agreed(step: int) -> int | None:
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        interrupted = multihost_utils.process_allgather(np.bool_(bool(received))).any()
        return signal.SIGINT if interrupted else signal.SIGTERM

    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return
    # With several processes SIGTERM belongs to JAX's service, which has them agree on a step.
    ours = [signal.SIGINT] if together else STOP_CODES
    previous = {number: signal.signal(number, handle) for number in ours}
    try:
        yield agreed if together else lambda step: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
