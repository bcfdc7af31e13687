"""Which server gets a call: the one that has read most of its prompt, unless that one has much more to do.

Each server has a prefix cache of its own. A prompt that one server has read is read anew by every other.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from dspy.lm15 import Request

BLOCK_CHARACTERS = 256
"""Length of the pieces by which prompts are compared (ours): some 64 tokens, a few blocks of vLLM's cache."""
LEAST_SHARE = 0.5
"""A server counts as having read a prompt from this share of it on (as `cache_threshold` of SGLang's router, 0.5).

A short instruction that all problems share would otherwise send all of them to the server that read it first.
"""
SPILL_CALLS = 4
"""A server with so many more calls in flight than the least loaded one gets no further call for its cache (ours).

Small, as an idle server costs more than a prompt that is read twice; not 0, or a group's calls, which come at once,
would each go to another server.
"""
MOST_BEGINNINGS = 200_000
"""So many are remembered; then all are forgotten (ours). What that costs is a prompt that is read once more."""


class Loaded(Protocol):
    """A server as it is chosen."""

    in_flight: int
    """Calls that wait for it now."""


Server = TypeVar("Server", bound=Loaded)


def beginnings(request: Request, adapter: str | None = None) -> list[int]:
    """A number for each beginning of the prompt, from the shortest to the whole; equal for equal beginnings.

    Args:
        request: The request.
        adapter: Its LoRA adapter: keys and values of another one are of no use.
    """
    text = f"{request.system!r}{request.tools!r}{request.messages!r}"
    number, numbers = hash(adapter), []
    for start in range(0, len(text), BLOCK_CHARACTERS):
        number = hash((number, text[start : start + BLOCK_CHARACTERS]))
        numbers.append(number)
    return numbers


class Routes(Generic[Server]):
    """Remembers who read which beginnings. Not thread-safe: its fleet holds a lock."""

    def __init__(self) -> None:
        self._readers: defaultdict[int, list[Server]] = defaultdict(list)
        self._turns: dict[int, int] = {}
        """Server (by `id`) -> when it was chosen last: of equally loaded ones the next in turn is taken."""
        self._chosen = 0

    def choose(self, prompt: Sequence[int], servers: Sequence[Server]) -> Server:
        """The server for a prompt.

        Args:
            prompt: Its `beginnings`; empty: whoever has least to do.
            servers: At least one.
        """
        least = self._least_loaded(servers)
        chosen = self._reader(prompt, servers) or least
        if chosen.in_flight > least.in_flight + SPILL_CALLS:
            chosen = least
        self._chosen += 1
        self._turns[id(chosen)] = self._chosen
        if len(self._readers) > MOST_BEGINNINGS:
            self._readers.clear()
        for number in prompt:
            if chosen not in self._readers[number]:
                self._readers[number].append(chosen)
        return chosen

    def forget_all(self) -> None:
        """All caches are empty: new weights are served."""
        self._readers.clear()

    def _reader(self, prompt: Sequence[int], servers: Sequence[Server]) -> Server | None:
        """The least loaded of those that read most of the prompt; None if nobody read `LEAST_SHARE` of it."""
        for number in reversed(prompt[int(LEAST_SHARE * len(prompt)) :]):
            if readers := [server for server in self._readers.get(number, ()) if server in servers]:
                return self._least_loaded(readers)
        return None

    def _least_loaded(self, servers: Sequence[Server]) -> Server:
        return min(servers, key=lambda server: (server.in_flight, self._turns.get(id(server), 0)))
