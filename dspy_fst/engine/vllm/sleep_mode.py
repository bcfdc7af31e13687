"""vLLM's sleep mode: the server gives its GPU memory back for a while, and takes it again.

Level 1 moves the weights to main memory and back. Level 2 drops them, so they must be loaded again. Keys and values are
lost at both, and the prefix cache with them. What stays on the card is the server's CUDA context and its graphs.

Read from vLLM 0.32 (`entrypoints/serve/dev/sleep`, `v1/engine/core.py`, `device_allocator/cumem.py`), which refuses
sleep mode on a CPU. It has not been tried on a card.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dspy_fst.engine.vllm.client import QUICK_TIMEOUT_S, VLLMClient
from dspy_fst.errors import EngineError


class UnverifiedWeightsError(EngineError):
    """The server slept, and its weights were not verified since. A call that meets this did not reach it."""

    def __init__(self) -> None:
        super().__init__("vLLM slept, and its weights were not verified since: ask again, or call load(checkpoint)")


class Doubt:
    """Whether a server's weights may be wrong, as it slept. Until they are verified only the verifying thread gets in.

    Calls that took the server before it slept wait at its lock, and would otherwise be the first ones after it.
    """

    def __init__(self) -> None:
        self._open = False
        self._verifier: int | None = None

    def arise(self) -> None:
        self._open = True

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Let this thread in, to load and verify the weights; all threads, once the block ends without an error."""
        self._verifier = threading.get_ident()
        try:
            yield
            self._open = False
        finally:
            self._verifier = None

    def refuse(self) -> None:
        """Raises UnverifiedWeightsError unless the weights are verified, or this thread does that now."""
        if self._open and self._verifier != threading.get_ident():
            raise UnverifiedWeightsError


def fall_asleep(client: VLLMClient, level: int) -> None:
    """Have a server without requests in flight sleep. The answer comes when its memory is free.

    Raises:
        EngineError: it does not sleep, or did not answer in time.
    """
    # By default vLLM ends requests in flight, and what they had sampled so far would be their reply.
    client.call("POST", f"/sleep?level={level}&mode=wait", timeout_s=client.load_timeout_s)
    _require(client, asleep=True)


def wake_up(client: VLLMClient) -> None:
    """Wake a server; one that is awake stays as it is.

    Raises:
        EngineError: it still sleeps, or did not answer in time.
    """
    client.call("POST", "/wake_up", timeout_s=client.load_timeout_s)
    _require(client, asleep=False)


def _require(client: VLLMClient, *, asleep: bool) -> None:
    if client.call("GET", "/is_sleeping", timeout_s=QUICK_TIMEOUT_S).json()["is_sleeping"] is not asleep:
        raise EngineError(
            f"vLLM at {client.address.url} {'did not fall asleep' if asleep else 'still sleeps'}, although it answered "
            f"that it {'sleeps' if asleep else 'woke up'}"
        )
