"""SIGTERM and SIGHUP end a run as Ctrl-C does: by an exception, so that everything that is held is let go."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(SystemExit):
    """The process was told to end; its exit status is the shell's 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def signals_raise() -> Iterator[None]:
    """In this block a signal that would have ended the process raises `Terminated` instead.

    A handler that somebody else set stays, and outside the main thread nothing changes: Python allows it there only.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    mine = []
    if threading.current_thread() is threading.main_thread():
        mine = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def interruption_named(error: BaseException) -> str | None:
    """``"Ctrl-C"`` or the signal's name when the error is an interruption, else None."""
    if isinstance(error, Terminated):
        return error.name
    return "Ctrl-C" if isinstance(error, KeyboardInterrupt) else None
