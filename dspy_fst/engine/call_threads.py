"""Threads in which an event loop's calls wait for what blocks: an engine's reply, or a program that runs."""

import asyncio
import contextvars
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Threads:
    """Daemon threads that are reused.

    Not an executor: it joins its threads when the interpreter exits, so a call that hangs would prevent the exit. Nor
    the loop's own: it has as many threads as the machine has cores and four, so that on two cores six calls would be
    in flight. Not a new thread for each job: the event loop would wait for each start, behind all threads that compute.

    Args:
        name: Of the threads.
        most: So many jobs run at once; later ones wait for a free thread. None: no job waits.
    """

    def __init__(self, name: str, most: int | None = None):
        self._name, self._most = name, most
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._started = 0

    def start(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._idle -= 1
            short = self._idle < 0 and (self._most is None or self._started < self._most)
            self._idle = max(self._idle, 0)
            self._started += short
        self._jobs.put(job)
        if short:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()

    async def run(self, work: Callable[[], T], when_over: Callable[[], None] = lambda: None) -> T:
        """Run a function in a thread, in this context, and wait for its result.

        Args:
            when_over: Called in the loop when the function has ended, also if nobody waits for it any more.
        """
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        future: asyncio.Future[T] = loop.create_future()

        def ended(result: T | None, error: BaseException | None) -> None:
            when_over()
            if future.done():
                return  # nobody waits any more
            if isinstance(error, StopIteration):  # a future takes none (PEP 479)
                future.set_exception(RuntimeError(f"the call raised StopIteration: {error}"))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = context.run(work)
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(ended, result, error)
            except RuntimeError:
                logger.warning("a call was still at work when its event loop ended")

        self.start(run)
        return await future

    def _work(self) -> None:
        while True:
            self._jobs.get()()
            with self._lock:
                self._idle += 1


MOST_CALLS = 1024
"""Calls of event loops that wait for an engine at once (ours): more than a vLLM server samples side by side."""
CALLS = Threads("policy-call", MOST_CALLS)
"""For the calls of every PolicyLM."""
