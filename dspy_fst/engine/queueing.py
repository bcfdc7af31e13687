"""Measures the time that a caller waits in an engine's own queue, so that time limits can exclude it.

The contract of this file: a time limit on a reply or a rollout measures work. While a call waits for the engine to
finish other callers' batches, its work has not begun, and its clock stands still.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class QueueTime:
    """Seconds during which at least one call of a rollout waited in the queue. Thread-safe.

    Calls of one rollout may overlap (``dspy.Parallel``). A second in which two of them wait counts once.

    Args:
        now: The clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._lock = threading.Lock()
        self._queued = 0.0
        self._waiting = 0
        self._since = 0.0

    @property
    def seconds(self) -> float:
        """Total so far, a current wait included."""
        with self._lock:
            return self._queued + (self._now() - self._since if self._waiting else 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of this block as the wait of one call."""
        with self._lock:
            if not self._waiting:
                self._since = self._now()
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._queued += self._now() - self._since


_current: ContextVar[QueueTime | None] = ContextVar("queue_time", default=None)


@contextmanager
def counted_in(queue_time: QueueTime) -> Iterator[None]:
    """Count the engine's waits of this thread in ``queue_time``, inside the block."""
    token = _current.set(queue_time)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def queueing() -> Iterator[None]:
    """An engine puts its wait for its own queue into this block."""
    current = _current.get()
    if current is None:
        yield
    else:
        with current.waiting():
            yield
