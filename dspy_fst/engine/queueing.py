"""Time that a caller spends in an engine's own queue, kept out of the limits on its work.

The contract of this file: a limit on a reply or on a rollout measures work. Work that waits for the engine to finish
other callers' batches has not begun, and its clock stands still.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class QueueTime:
    """Seconds during which at least one call of a rollout was queueing. Thread-safe.

    Calls of one rollout may overlap (``dspy.Parallel``); a second in which two of them queue counts once.

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
        """So far, a wait that still goes on included."""
        with self._lock:
            return self._queued + (self._now() - self._since if self._waiting else 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """One call queues for as long as this is open."""
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
    """The engine's waits inside, in this thread, are counted in ``queue_time``."""
    token = _current.set(queue_time)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def queueing() -> Iterator[None]:
    """Said by an engine round a wait for its own queue."""
    current = _current.get()
    if current is None:
        yield
    else:
        with current.waiting():
            yield
