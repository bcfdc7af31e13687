"""Places for requests: so many at work, so many in line, no more. Belongs to one event loop."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_POLL_S = 0.05


class LineFullError(Exception):
    """There is no place left, not even in line."""


class Ticket:
    """One request's place at work. It is free again when the request is over and every thread of it has ended.

    A thread cannot be stopped: were its place given away when its caller leaves or its time is over, a slow program
    would fill the machine with threads that nobody waits for.

    Args:
        until: When its time is over, by ``time.monotonic``.
    """

    def __init__(self, gate: "Gate", until: float):
        self.until = until
        self.overdue = False
        """Whether the request is over while a thread of it still runs."""
        self._gate = gate
        self._holders = 0

    @property
    def has_turn(self) -> bool:
        return self._holders > 0

    @property
    def why_over(self) -> str:
        """Why the request was given up, for the log."""
        if time.monotonic() >= self.until:
            return "the request is over its time"
        return "the server ends" if self._gate.expired else "the caller left"

    async def turn(self) -> None:
        """Wait in line for a place at work."""
        await self._gate.turns.acquire()
        self._gate.tickets.add(self)
        self._holders = 1

    def hold(self) -> None:
        """One more works for this request."""
        self._holders += 1

    def let_go(self) -> None:
        """One of them has ended."""
        self._holders -= 1
        if not self._holders:
            self._gate.tickets.discard(self)
            self._gate.turns.release()

    def end(self) -> None:
        """The request is over: it was answered, given up, or never had its turn."""
        if self.has_turn:
            self.let_go()
            self.overdue = self.has_turn


class Gate:
    """Lets requests in, one ticket each.

    Args:
        places: Requests at work at once.
        line: Requests that may wait for a place.
    """

    def __init__(self, places: int, line: int):
        self.places, self.line = places, line
        self.draining = False
        """Set for good when the server is told to end: nobody is let in any more."""
        self.expired = False
        """Set for good when those who are in are not waited for any more."""
        self.turns = asyncio.Semaphore(places)
        self.tickets: set[Ticket] = set()
        """The places taken now."""
        self._requests = 0
        self._deadlines: set[asyncio.Timeout] = set()

    def at_work(self) -> int:
        return len(self.tickets)

    def overdue(self) -> int:
        return sum(ticket.overdue for ticket in self.tickets)

    def stuck(self) -> int:
        """Places whose request is over its time. One whose caller just left is none: it ends at its next call."""
        return sum(ticket.overdue and time.monotonic() >= ticket.until for ticket in self.tickets)

    def waiting(self) -> int:
        return self._requests + self.overdue() - self.at_work()

    @asynccontextmanager
    async def admitted(self, timeout_s: float) -> AsyncIterator[Ticket]:
        """A block for one request; it has its place at work only after ``await ticket.turn()``.

        Raises:
            LineFullError: at once.
            TimeoutError: the block took longer than ``timeout_s`` seconds, or `expire` was called.
        """
        if self._requests + self.overdue() >= self.places + self.line:
            raise LineFullError
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
        """Wait until every request that was let in is over; returns how many are not after ``limit_s`` seconds."""
        until = time.monotonic() + limit_s
        while self._requests and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        return self._requests

    def expire(self) -> None:
        """Let the time of every request that is in be over now."""
        self.expired = True
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(asyncio.get_running_loop().time())
