"""How often, and with which waits, a live vLLM server is asked again for what it did not answer."""

import threading
from collections.abc import Callable

from tenacity import Retrying, retry_if_exception, sleep_using_event, wait_exponential, wait_random
from tenacity.stop import stop_after_attempt, stop_after_delay, stop_any

ATTEMPTS = 5
"""How many times a request is sent to a live server before the server counts as failed."""
FIRST_WAIT_S, LONGEST_WAIT_S, JITTER_S = 0.5, 8.0, 0.5
"""Waits between attempts: 0.5 s, 1 s, 2 s ... plus a random part, so that the threads do not all ask at once."""


def repeating(
    passes: Callable[[BaseException], bool], closing: threading.Event, tell: Callable[[], None], within_s: float
) -> Retrying:
    """Repeats what it is called with, and raises its last error.

    Args:
        passes: Whether an error may pass when asked again.
        closing: Ends a wait.
        tell: Called before each repetition.
        within_s: Nothing is repeated that has taken longer by then, in seconds.
    """
    return Retrying(
        retry=retry_if_exception(passes),
        stop=stop_any(stop_after_attempt(ATTEMPTS), stop_after_delay(within_s)),
        wait=wait_exponential(FIRST_WAIT_S, max=LONGEST_WAIT_S) + wait_random(0, JITTER_S),
        sleep=sleep_using_event(closing),
        before_sleep=lambda _: tell(),
        reraise=True,
    )
