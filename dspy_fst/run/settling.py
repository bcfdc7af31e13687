"""The outcome of a function that a thread of its own runs, for whoever waits for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def settle(answer: "Future[T]", ask: Callable[[], T]) -> None:
    """Put what a function returns or raises into a future, unless it has been given up."""
    try:
        found = ask()
    except BaseException as error:
        with suppress(InvalidStateError):
            answer.set_exception(error)
        return
    with suppress(InvalidStateError):
        answer.set_result(found)


def settle_in_thread(answer: "Future[T]", ask: Callable[[], T], name: str) -> threading.Thread:
    """`settle` in a thread of this name. One that never ends does not hold up the end of the process."""
    thread = threading.Thread(target=settle, args=(answer, ask), name=name, daemon=True)
    thread.start()
    return thread
