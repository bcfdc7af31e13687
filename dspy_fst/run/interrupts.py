"""SIGTERM and SIGHUP end a run as Ctrl-C does: by an exception, so that every resource is released.

Ctrl-C shows one sentence and no traceback. Python prints a traceback for an uncaught KeyboardInterrupt, and the hook
that prints it (``sys.excepthook``) belongs to the user's program, so the exception itself defines how it is shown.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
_raised: list[int] = []
"""The signals that a block of `signals_raise` has had."""
_to_the_end: list[bool] = []
"""Not empty: what `signals_ignored` has begun lasts."""
_changing = threading.Lock()
"""A signal of `terminate_run` that came when its handler was just gone would end the process."""


class Terminated(SystemExit):
    """A signal ended the process; its exit status is the shell's: 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run cleanly; ``str()`` says what is saved. A notebook shows only this sentence."""

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback."""
        return [str(self)]


class InterruptedScript(SystemExit, Interrupted):
    """`Interrupted` in a script. Uncaught, it ends the script with the shell's status for Ctrl-C and no traceback."""

    def __init__(self, text: str):
        super().__init__(text)
        self.code = 128 + signal.SIGINT


@contextmanager
def ctrl_c_as_sentence(shown: bool) -> Iterator[None]:
    """In this block Ctrl-C becomes an `Interrupted`. In a script it also prints its sentence, unless that was shown.

    At a prompt nothing may exit, so there the exception is no SystemExit.

    Args:
        shown: Whether the sentence of the exception was already shown.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        printed = shown and bool(error.args)
        text = str(error) or "Ctrl-C: stopped before the run was under way; nothing was trained"
        if _at_a_prompt():
            raise Interrupted(text) from None
        if not printed:
            print(text, file=sys.stderr)
        raise InterruptedScript(text) from None


def _at_a_prompt() -> bool:
    """Whether the interpreter is interactive: Python's prompt, ``python -i``, IPython, a notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


@contextmanager
def signals_raise() -> Iterator[None]:
    """In this block SIGTERM and SIGHUP raise `Terminated` instead of ending the process.

    A handler that is already set stays. Outside the main thread nothing changes: Python sets handlers only there.
    """

    def end(number: int, frame: FrameType | None) -> None:
        _raised.append(number)
        raise Terminated(number)

    mine = []
    if threading.current_thread() is threading.main_thread():
        mine = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        with _changing:
            for number in mine:
                if not _to_the_end:
                    signal.signal(number, signal.SIG_DFL)
            if mine:
                _raised.clear()


@contextmanager
def terminated_again() -> Iterator[None]:
    """In this block a SystemExit that a library made of `Terminated` is `Terminated` again.

    Ray (2.60) makes a plain SystemExit of what a signal's handler raises in one of its calls.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error, Terminated) or not _raised:
            raise
        raise Terminated(_raised[-1]) from None


def signals_ignored() -> None:
    """SIGTERM and SIGHUP change nothing until the block of `signals_raise` is left, because the process ends already.

    Without such a block nothing changes.
    """
    if threading.current_thread() is threading.main_thread():
        for number in filter(_raises, ENDING):
            signal.signal(number, signal.SIG_IGN)


def ignored_to_the_end() -> None:
    """What `signals_ignored` has begun lasts beyond the block, as a launcher kills this process if it does not end."""
    _to_the_end.append(True)


def terminate_run() -> None:
    """Have the block of `signals_raise` end by SIGTERM, from any thread. Without such a block nothing changes."""
    with _changing:
        if _raises(signal.SIGTERM):
            os.kill(os.getpid(), signal.SIGTERM)


def _raises(number: int) -> bool:
    """Whether this signal ends a block of `signals_raise`."""
    return getattr(signal.getsignal(number), "__qualname__", "").startswith(signals_raise.__name__)


def interruption_named(error: BaseException) -> str | None:
    """``"Ctrl-C"`` or the signal's name when the error is an interruption, else None."""
    if isinstance(error, Terminated):
        return error.name
    return "Ctrl-C" if isinstance(error, KeyboardInterrupt) else None
