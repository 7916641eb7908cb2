"""When a run saves, beside before its evaluations: by time and by steps, the same in all of its processes."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

MOST_COST = 0.05
"""Share of the time that steps may wait for checkpoints that are saved by time."""
SECONDS_BETWEEN_QUESTIONS = 5.0
"""Several processes ask process 0 so often, all after the same step: their clocks differ."""


class SaveClock:
    """Says after which steps a checkpoint is due.

    Args:
        minutes: since the last one.
        steps: between two, or None.
    """

    def __init__(self, minutes: float, steps: int | None):
        self._seconds, self._steps = 60 * minutes, steps
        self._last_save = self._last_question = time.monotonic()
        self._waited = 0.0
        self._next_question: int | None = None
        self._last_asked = 0

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step; asked after each."""
        if self._steps and step % self._steps == 0:
            return True
        if jax.process_count() == 1:
            return self._is_time(0.0)
        if self._next_question is None:
            self._next_question, self._last_asked = step, step - 1
        if step < self._next_question:
            return False
        now = time.monotonic()
        seconds_per_step = (now - self._last_question) / (step - self._last_asked)
        more = int(np.clip(SECONDS_BETWEEN_QUESTIONS / max(seconds_per_step, 1e-6), 1, 10_000))
        answer = np.array([self._is_time(2 * more * seconds_per_step), more], np.int32)
        due, more = multihost_utils.broadcast_one_to_all(answer)
        self._last_question, self._last_asked, self._next_question = now, step, step + int(more)
        return bool(due)

    def _is_time(self, until_next: float) -> bool:
        seconds = max(self._seconds, self._waited / MOST_COST)
        return time.monotonic() - self._last_save + until_next >= seconds

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A checkpoint is saved inside, for whatever reason."""
        began = time.monotonic()
        yield
        self._last_save = time.monotonic()
        self._waited = self._last_save - began
