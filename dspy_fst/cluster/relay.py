"""The actor through which workers reach the process that began the run.

Ray lets a process call actors, and nobody call the process. So workers ask here, and that process takes what was asked
and tells the answers. Whatever it carries is bytes: the actor imports neither DSPy nor a model's tokenizer.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import NamedTuple

import ray

QUEUED, WORKING = "queued", "working"
"""What a call is told before its answer: it waits in the engine's queue, or its reply is being sampled."""
Word = str | bytes
"""QUEUED or WORKING, as often as they change; then the answer."""


class CallHeard(NamedTuple):
    """A worker calls the policy."""

    chunk: str
    number: int
    """For `Relay.tell`."""
    call: bytes


class InFlight(NamedTuple):
    """So many rollouts of a chunk are in flight now."""

    chunk: str
    in_flight: int


class Relay:
    """See the module."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[CallHeard | InFlight] = asyncio.Queue()
        self._answers: dict[int, asyncio.Queue[Word]] = {}
        self._numbers = itertools.count()

    @ray.method(num_returns="streaming")
    async def ask(self, chunk: str, call: bytes) -> AsyncIterator[Word]:
        """The words on a call, the last of which is the answer."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.Queue()
        self._heard.put_nowait(CallHeard(chunk, number, call))
        try:
            while not isinstance(word := await answer.get(), bytes):
                yield word
            yield word
        finally:
            del self._answers[number]

    @ray.method
    async def say(self, chunk: str, in_flight: int) -> None:
        """So many rollouts of a chunk are in flight now."""
        self._heard.put_nowait(InFlight(chunk, in_flight))

    @ray.method
    async def take(self, seconds: float) -> list[CallHeard | InFlight]:
        """All that was heard since the last call; empty if nothing is heard for so many seconds."""
        try:
            heard = [await asyncio.wait_for(self._heard.get(), seconds)]
        except TimeoutError:
            return []
        while not self._heard.empty():
            heard.append(self._heard.get_nowait())
        return heard

    @ray.method
    async def tell(self, number: int, word: Word) -> None:
        """Pass a word on to whoever asked; a worker that is gone hears nothing."""
        if (answer := self._answers.get(number)) is not None:
            answer.put_nowait(word)
