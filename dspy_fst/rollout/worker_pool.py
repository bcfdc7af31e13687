"""Many jobs on a few daemon threads, each job with a time limit that leaves out the wait for the engine.

Python's ThreadPoolExecutor cannot abandon a job that hangs, and it waits for its threads when the interpreter exits.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from dspy_fst.engine.base import QUEUEING

T = TypeVar("T")
LONGEST_WAIT_S = 1.0
"""Most seconds between two searches for overdue jobs (ours)."""


def run_all(
    jobs: Sequence[Callable[[], T]],
    *,
    threads: int,
    timeout_s: float,
    on_timeout: Callable[[int], T],
    in_flight: Callable[[int], None] = lambda count: None,
    on_result: Callable[[T], None] = lambda result: None,
    queued_s: Callable[[int], float] = lambda index: 0.0,
) -> list[T]:
    """Run every job, and return the results in the order of the jobs.

    Args:
        jobs: The jobs, functions without arguments.
        threads: How many jobs run at once.
        timeout_s: Seconds that a job may run. After that its result is ``on_timeout(index)``. Its thread is abandoned,
            and a new thread takes its place.
        on_timeout: Returns the result of an overdue job.
        in_flight: Called with the number of jobs that run or are about to, before the first starts and when one ends.
        on_result: Called in this thread with each result as it comes.
        queued_s: Returns the seconds that a job has waited for its turn elsewhere. They do not count as running time.

    Raises:
        Exception: the first exception of a job. Jobs that have not started are dropped.
    """
    pool = _Pool(jobs, threads, timeout_s, in_flight, queued_s)
    results: dict[int, T] = {}
    pool.start()
    try:
        while len(results) < len(jobs):
            new = dict(pool.ended(wait_s=min(LONGEST_WAIT_S, timeout_s / 4)))
            for index in pool.abandon_overdue():
                new[index] = on_timeout(index)
            for index, result in new.items():
                results[index] = result
                on_result(result)
    finally:
        pool.drop_the_rest()
    return [results[index] for index in range(len(jobs))]


@dataclass(frozen=True)
class _Ended(Generic[T]):
    """A job that ended, with its result or its exception."""

    index: int
    result: T | None
    error: BaseException | None


class _Pool(Generic[T]):
    """The threads and their jobs. Whatever threads share is changed under one lock."""

    def __init__(
        self,
        jobs: Sequence[Callable[[], T]],
        threads: int,
        timeout_s: float,
        in_flight: Callable[[int], None],
        queued_s: Callable[[int], float],
    ):
        self._jobs, self._threads, self._timeout_s = jobs, threads, timeout_s
        self._in_flight, self._queued_s = in_flight, queued_s
        self._lock = threading.Lock()
        self._todo = deque(range(len(jobs)))
        self._started: dict[int, float] = {}
        """Job -> its start time, for the jobs that run and are not overdue."""
        self._left = len(jobs)
        """Jobs without a result."""
        self._ended: queue.SimpleQueue[_Ended[T]] = queue.SimpleQueue()

    def start(self) -> None:
        self._tell_in_flight()
        for _ in range(min(self._threads, len(self._jobs))):
            self._start_thread()

    def ended(self, wait_s: float) -> list[tuple[int, T]]:
        """(job, result) of the next job that ended; empty if none ends within ``wait_s`` seconds.

        Raises:
            BaseException: what the job raised.
        """
        try:
            job = self._ended.get(timeout=wait_s)
        except queue.Empty:
            return []
        if job.error is not None:
            raise job.error
        return [(job.index, job.result)]  # type: ignore[list-item]

    def abandon_overdue(self) -> list[int]:
        """The jobs that are over their time. Their results are no longer taken, and their threads are replaced."""
        with self._lock:
            now = time.monotonic()
            overdue = [i for i, since in self._started.items() if now - since - self._queued_s(i) > self._timeout_s]
            for index in overdue:
                del self._started[index]
            self._left -= len(overdue)
            if overdue:
                self._tell_in_flight()
        for _ in overdue:
            self._start_thread()
        return overdue

    def drop_the_rest(self) -> None:
        """Start no more jobs."""
        with self._lock:
            self._todo.clear()
        self._in_flight(0)

    def _tell_in_flight(self) -> None:
        self._in_flight(min(self._left, self._threads))

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="rollout", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._todo:
                    return
                index = self._todo.popleft()
                self._started[index] = time.monotonic()
            try:
                job = _Ended(index, self._jobs[index](), None)
            except BaseException as error:
                job = _Ended(index, None, error)
            with self._lock:
                if self._started.pop(index, None) is None:
                    return  # it was abandoned, and another thread has taken this one's place
                self._left -= 1
                self._tell_in_flight()
            self._ended.put(job)


class QueueTime:
    """Seconds during which at least one call of a rollout waited in the queue. Thread-safe.

    A time limit on a rollout measures work: while a call waits for the engine to finish other callers' batches, the
    rollout's clock stands still. Calls of one rollout may overlap (``dspy.Parallel``). A second in which two of them
    wait counts once.

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

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the engine's waits of this thread inside the block."""
        token = QUEUEING.set(self.waiting)
        try:
            yield
        finally:
            QUEUEING.reset(token)
