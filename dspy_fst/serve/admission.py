"""The admission queue: a limited number of requests at work, a limited number waiting. Belongs to one event loop."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_POLL_S = 0.05


class QueueFullError(Exception):
    """All slots are taken and the queue is full."""


class Ticket:
    """One request's slot. It becomes free when the request is over and all of its threads have ended.

    A thread cannot be stopped. If its slot became free as soon as its caller left or timed out, a slow program would
    fill the machine with threads that nobody waits for.

    Args:
        until: The request's deadline, by ``time.monotonic``.
    """

    def __init__(self, queue: "AdmissionQueue", until: float):
        self.until = until
        self.overdue = False
        """Whether the request is over while one of its threads still runs."""
        self._queue = queue
        self._holders = 0

    @property
    def has_turn(self) -> bool:
        return self._holders > 0

    @property
    def why_over(self) -> str:
        """Why the request was abandoned, for the log."""
        if time.monotonic() >= self.until:
            return "the request timed out"
        return "the server is shutting down" if self._queue.expired else "the caller left"

    async def turn(self) -> None:
        """Wait for a slot."""
        await self._queue.turns.acquire()
        self._queue.tickets.add(self)
        self._holders = 1

    def hold(self) -> None:
        """One more thread works for this request."""
        self._holders += 1

    def let_go(self) -> None:
        """One of its threads has ended."""
        self._holders -= 1
        if not self._holders:
            self._queue.tickets.discard(self)
            self._queue.turns.release()

    def end(self) -> None:
        """The request is over: it was answered or abandoned, or it never got a slot."""
        if self.has_turn:
            self.let_go()
            self.overdue = self.has_turn


class AdmissionQueue:
    """Admits requests, with one ticket each.

    Args:
        slots: Requests that are at work at once.
        max_waiting: Requests that may wait for a slot.
    """

    def __init__(self, slots: int, max_waiting: int):
        self.slots, self.max_waiting = slots, max_waiting
        self.draining = False
        """Set for good when the server is told to end: no further request is admitted."""
        self.expired = False
        """Set for good when the server no longer waits for admitted requests."""
        self.turns = asyncio.Semaphore(slots)
        self.tickets: set[Ticket] = set()
        """One for each taken slot."""
        self._requests = 0
        self._deadlines: set[asyncio.Timeout] = set()

    def at_work(self) -> int:
        return len(self.tickets)

    def overdue(self) -> int:
        return sum(ticket.overdue for ticket in self.tickets)

    def stuck(self) -> int:
        """Slots of requests that timed out. A request whose caller left does not count: it ends at its next call."""
        return sum(ticket.overdue and time.monotonic() >= ticket.until for ticket in self.tickets)

    def waiting(self) -> int:
        return self._requests + self.overdue() - self.at_work()

    @asynccontextmanager
    async def admitted(self, timeout_s: float) -> AsyncIterator[Ticket]:
        """A block for one request. Its work may begin after ``await ticket.turn()``.

        Raises:
            QueueFullError: immediately, when no request may wait any more.
            TimeoutError: the block took longer than ``timeout_s`` seconds, or `expire` was called.
        """
        if self._requests + self.overdue() >= self.slots + self.max_waiting:
            raise QueueFullError
        ticket = Ticket(self, time.monotonic() + timeout_s)
        self._requests += 1
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                self._deadlines.add(deadline)
                try:
                    yield ticket
                finally:
                    self._deadlines.discard(deadline)
        finally:
            self._requests -= 1
            ticket.end()

    async def emptied(self, limit_s: float) -> int:
        """Wait until every admitted request is over; return how many are not after ``limit_s`` seconds."""
        until = time.monotonic() + limit_s
        while self._requests and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        return self._requests

    def expire(self) -> None:
        """Let every admitted request time out now."""
        self.expired = True
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(asyncio.get_running_loop().time())
