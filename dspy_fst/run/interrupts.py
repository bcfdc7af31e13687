"""SIGTERM and SIGHUP end a run as Ctrl-C does: by an exception, so that everything that is held is let go.

Ctrl-C itself is told in one sentence. Python shows a traceback of any KeyboardInterrupt that nobody catches, and what
shows it (``sys.excepthook``) belongs to the user's program; so the exception itself says how it is to be shown.
"""

import signal
import sys
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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run in order; ``str()`` says what is saved. A notebook shows this sentence alone."""

    def _render_traceback_(self) -> list[str]:
        """Read by IPython in the place of a traceback."""
        return [str(self)]


class InterruptedScript(SystemExit, Interrupted):
    """The same in a script: one that does not catch it ends with the shell's status for Ctrl-C and no traceback."""

    def __init__(self, text: str):
        super().__init__(text)
        self.code = 128 + signal.SIGINT


@contextmanager
def ctrl_c_told(told: bool) -> Iterator[None]:
    """In this block Ctrl-C becomes an `Interrupted`, which in a script prints its sentence unless somebody did.

    At a prompt nothing may exit: there it stays an ordinary KeyboardInterrupt.

    Args:
        told: Whether what the exception says of itself was shown already.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        shown = told and bool(error.args)
        text = str(error) or "Ctrl-C: stopped before the run was under way; nothing was trained"
        if _at_a_prompt():
            raise Interrupted(text) from None
        if not shown:
            print(text, file=sys.stderr)
        raise InterruptedScript(text) from None


def _at_a_prompt() -> bool:
    """Whether a person goes on typing after the exception: Python's prompt, ``python -i``, IPython, a notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


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
