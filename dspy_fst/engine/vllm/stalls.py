"""Ends a server that hangs: requests are in flight, but no token is processed.

/health does not show a hang: vLLM's API process answers it even while its engine process stands still. The counters of
processed tokens do: they change whenever the server works. Reading them takes 5 ms, or 30 ms on a busy server.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable

from dspy_fst.engine.vllm.server import VLLMServer

logger = logging.getLogger(__name__)

_POLLS = 10
"""Successive polls without progress that count as a hang. Polls and not a clock: this process may itself have stood
still meanwhile."""


def kill(server: VLLMServer, reason: str) -> None:
    """End a server that was launched here; does nothing to another one."""
    server.kill(reason)


def watch(server: VLLMServer, stall_timeout_s: float, end: Callable[[VLLMServer, str], None] = kill) -> None:
    """End the server if it makes no progress for ``stall_timeout_s`` seconds while requests are in flight.

    The watchdog runs in its own thread, until the server is closed or nobody refers to it.

    Args:
        end: Called with the server and the reason.
    """
    if not server.progress(stall_timeout_s)[1]:
        logger.warning("vLLM shows no token counters at /metrics: a hang will only show by request_timeout_s")
        return
    thread = threading.Thread(
        target=_watch, args=(weakref.ref(server), stall_timeout_s, end), name="vllm watchdog", daemon=True
    )
    thread.start()


def _watch(
    reference: "weakref.ref[VLLMServer]", stall_timeout_s: float, end: Callable[[VLLMServer, str], None]
) -> None:
    every = stall_timeout_s / _POLLS
    seen, still = None, 0
    while (server := reference()) is not None and server.address is not None:
        began = time.monotonic()
        mark = server.progress(every) if server.in_flight else None
        still = still + 1 if mark is not None and mark == seen else 0
        if still == _POLLS:
            end(
                server,
                f"no token was processed for {stall_timeout_s:g} s (stall_timeout_s) with {server.in_flight} "
                "requests in flight",
            )
            return
        seen = mark
        del server  # so that the server can be collected, and ended, while this thread sleeps
        time.sleep(max(0.0, every - (time.monotonic() - began)))
