"""What a test that makes nodes of a Ray cluster in its own process owes the others there."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_as_before() -> Iterator[None]:
    """The block in which nodes are made: each handles SIGTERM from then on, in the process of all tests."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
