"""The outcome of a function that a thread of its own runs, for whoever waits for it."""

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
