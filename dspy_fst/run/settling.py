"""The outcome of a function that a thread of its own runs, for whoever waits for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def settle(answer: "Future[T]", ask: Callable[[], T], unwanted: Callable[[T], None] | None = None) -> None:
    """Put what a function returns or raises into a future, unless it has been given up.

    Args:
        unwanted: Called with what the function returned, if nobody waits for it any more.
    """
    try:
        found = ask()
    except BaseException as error:
        with suppress(InvalidStateError):
            answer.set_exception(error)
        return
    try:
        answer.set_result(found)
    except InvalidStateError:
        if unwanted is not None:
            unwanted(found)


def settle_in_thread(
    answer: "Future[T]", ask: Callable[[], T], name: str, unwanted: Callable[[T], None] | None = None
) -> threading.Thread:
    """`settle` in a thread of this name. One that never ends does not hold up the end of the process."""
    thread = threading.Thread(target=settle, args=(answer, ask, unwanted), name=name, daemon=True)
    thread.start()
    return thread
