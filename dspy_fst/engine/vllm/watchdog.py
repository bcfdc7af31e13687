"""Ends a server that hangs: requests are in flight and nothing moves.

/health does not show it: vLLM's API process answers there also while its engine process stands still. What a
working server cannot help moving are its counters of processed tokens (read in 5 ms, 30 when busy).
"""

import logging
import threading
import time
import weakref

from dspy_fst.engine.vllm.server import VLLMServer

logger = logging.getLogger(__name__)

_POLLS = 10
"""Looks in a row that must find nothing moved. Looks and not a clock: this process may have stood still itself."""


def watch(server: VLLMServer, stall_timeout_s: float) -> None:
    """Kill the server once it makes no progress for ``stall_timeout_s`` seconds with requests in flight.

    Watches in a thread of its own, until the server is closed or nobody holds it.
    """
    if not server.progress(stall_timeout_s)[1]:
        logger.warning("vLLM shows no token counters at /metrics: a hang will only show by request_timeout_s")
        return
    thread = threading.Thread(
        target=_watch, args=(weakref.ref(server), stall_timeout_s), name="vllm watchdog", daemon=True
    )
    thread.start()


def _watch(held: "weakref.ref[VLLMServer]", stall_timeout_s: float) -> None:
    every = stall_timeout_s / _POLLS
    seen, still = None, 0
    while (server := held()) is not None and server.address is not None:
        began = time.monotonic()
        mark = server.progress(every) if server.in_flight else None
        still = still + 1 if mark is not None and mark == seen else 0
        if still == _POLLS:
            server.kill(
                f"no token was processed for {stall_timeout_s:g} s (stall_timeout_s) with {server.in_flight} "
                "requests in flight"
            )
            return
        seen = mark
        del server  # what nobody else holds is ended while this thread sleeps
        time.sleep(max(0.0, every - (time.monotonic() - began)))
