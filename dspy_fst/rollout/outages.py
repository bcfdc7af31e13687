"""Outages inside a rollout that never reached its end as an exception: seen where they happen, and who took them up.

An LM that fails and a tool that is gone raise where they are called. What becomes of that is one of three things:

- It ends the program: the exception says all (see `dspy_fst.rollout.outcome_rules`).
- The program catches it, asks again or goes on without: then what comes after is measured. An agent that is told of
  it in words (dspy.ReAct) goes on in the same way.
- DSPy catches it and leaves a hole: dspy.Parallel a None in the place of a result, BestOfN and Refine no prediction, a
  task or a future an exception that nobody asked for. A program that then falls over that hole did not fail through the
  policy's doing.

Which of them it was is read from the exception's traceback when the rollout is over: its outermost frame is of whoever
caught it, or of the coroutine that it ended.
"""

import dis
import inspect
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError

from dspy_fst.errors import EngineError
from dspy_fst.rollout.call_recorder import is_recorded
from dspy_fst.types import PREDICTOR_TAG

LEAVES_A_HOLE = (
    "dspy.utils.parallelizer",
    "dspy.predict.best_of_n",
    "dspy.predict.refine",
    "dspy.utils.callback",
    "dspy.primitives.module",
    "concurrent.futures.thread",
    "multiprocessing.pool",
    "threading",
)
"""Modules that keep an exception to themselves, of DSPy 3.4 and of Python. The last five begin tasks and threads: an
exception whose outermost frame is theirs stayed in an asyncio.gather(return_exceptions=True), a future or a thread."""
TRIES = ("dspy.predict.best_of_n", "dspy.predict.refine")
"""Those of them that go on trying: no hole where a later try gave a prediction."""
RAISES = ("RERAISE", "RAISE_VARARGS")
"""CPython's instructions that raise by themselves."""
GONE = {
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "aiohttp": ("ClientConnectionError",),
    "openai": ("APIConnectionError",),
    "urllib3": ("MaxRetryError", "ProtocolError", "TimeoutError"),
}
"""Package -> its classes for a server that does not answer, where these are no OSError. litellm's are openai's."""
OF_THE_CALLER = ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL")
"""Classes below those in GONE that say that the request itself is wrong."""
TOO_MANY_REQUESTS = 429


class Outages(BaseCallback):
    """DSPy's callback for the time of one rollout."""

    def __init__(self) -> None:
        self._recorded: dict[str, bool] = {}
        self._seen: list[tuple[str, BaseException]] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._recorded[call_id] = is_recorded(instance)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        recorded = self._recorded.pop(call_id, False)
        if exception is None or (recorded and not _is_an_lm_s(exception)):
            return  # that a prompt overflows the policy's context, or cannot be written at all, is no outage
        who = "lm" if recorded else "frozen lm"
        self._seen.append((f"{who}: {type(exception.__cause__ or exception).__name__}", exception))

    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._look(exception)

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if isinstance(instance, dspy.Predict) and hasattr(instance, PREDICTOR_TAG):
            lm = (inputs.get("kwargs") or {}).get("lm") or instance.lm or dspy.settings.lm
            self._recorded[call_id] = is_recorded(lm)

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        recorded = self._recorded.pop(call_id, True)
        if isinstance(exception, AdapterParseError) and not recorded:
            self._seen.append((f"frozen lm: {type(exception).__name__}", exception))
        else:
            self._look(exception, "lm" if recorded else "frozen lm")

    def _look(self, exception: BaseException | None, who: str = "lm") -> None:
        if exception is not None and not self._is_known(exception) and (reason := self.cause_of(exception, who)):
            self._seen.append((reason, exception))

    def _is_known(self, error: Any) -> bool:
        return any(error is seen for _, seen in self._seen)

    def cause_of(self, error: BaseException, who: str = "lm") -> str | None:
        """The outage that an exception is, or was raised from, as a mask's reason; else None.

        Args:
            who: Whose LM it was, should it be an LM's and not have been seen before.
        """
        for link in chain(error):
            if reason := next((reason for reason, seen in self._seen if seen is link), None):
                return reason
            if is_a_network_fault(link):
                return f"outage: {type(link).__name__}"
            if _is_an_lm_s(link):
                return f"{who}: {type(link).__name__}"
        return None

    def behind(self, error: BaseException | None = None) -> str | None:
        """The outage that kept the rollout from its result, as a mask's reason; else None.

        Args:
            error: What ended the program; None where it ended without a result.
        """
        if error is not None and (reason := self.cause_of(error)):
            return reason
        tripped_over = getattr(error, "obj", None)  # of an AttributeError: what has no such attribute
        if isinstance(tripped_over, BaseException) and (reason := self.cause_of(tripped_over)):
            return reason
        return next((reason for reason, seen in self._seen if leaves_a_hole(seen)), None)

    def forget(self) -> None:
        """Let go of the exceptions, whose tracebacks hold the rollout's copy of the program."""
        self._seen.clear()


def _is_an_lm_s(error: BaseException) -> bool:
    overflow = isinstance(error, ContextWindowExceededError)
    return isinstance(error, LMError | EngineError | OSError) and not overflow


def leaves_a_hole(error: BaseException) -> bool:
    """Whether DSPy, a task or a thread kept an exception to itself, and nothing came in its place."""
    if error.__traceback__ is None:
        return False
    frame: FrameType = error.__traceback__.tb_frame
    where = frame.f_globals.get("__name__")
    if where in TRIES:
        return frame.f_locals.get("best_pred") is None
    return where in LEAVES_A_HOLE or _ended_a_coroutine(error.__traceback__)


def _ended_a_coroutine(outermost: TracebackType) -> bool:
    """Whether the exception left a coroutine, and so stayed in its task.

    The coroutine's last instruction is then the one that raised, or that raises anew after a ``finally`` or in an
    ``except``. One that handled the exception ended on another.
    """
    frame = outermost.tb_frame
    if not frame.f_code.co_flags & inspect.CO_COROUTINE or frame.f_lasti < 0:
        return False
    return frame.f_lasti == outermost.tb_lasti or dis.opname[frame.f_code.co_code[frame.f_lasti]] in RAISES


# ---- what an exception says of itself -------------------------------------------------------------


def is_a_network_fault(error: BaseException) -> bool:
    """Whether a server could not be reached, or answered that it is busy (429) or broken (5xx).

    Told by names and attributes, as the clients (httpx, requests, aiohttp, openai, litellm) need not be installed.
    """
    if isinstance(error, OSError):
        return True
    known = [(of.__module__.partition(".")[0], of.__name__) for of in type(error).__mro__]
    if any(name in OF_THE_CALLER for _, name in known):
        return False
    return any(name in GONE.get(package, ()) for package, name in known) or _says_so(error)


def _says_so(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    given = [getattr(of, name, None) for of in (error, response) for name in ("status_code", "status")]
    return any(type(status) is int and (status == TOO_MANY_REQUESTS or 500 <= status < 600) for status in given)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, those in its group, and those that it was raised from, each once."""
    left, seen = [error], set[int]()
    while left:
        link = left.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, BaseExceptionGroup):
            left += link.exceptions
        if link.__cause__ is not None:
            left.append(link.__cause__)
        elif link.__context__ is not None and not link.__suppress_context__ and _takes_its_place(link):
            left.append(link.__context__)


def _takes_its_place(error: BaseException) -> bool:
    """Whether an exception was put in the place of its context: a ``raise`` in the very function that caught that.

    What fails otherwise while an exception is handled, as in a second try, is a failure of its own.
    """
    raised = error.__traceback__
    caught = error.__context__.__traceback__ if error.__context__ is not None else None
    if raised is None or caught is None:
        return False
    while raised.tb_next is not None:
        raised = raised.tb_next
    is_a_raise = raised.tb_frame.f_code.co_code[raised.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_a_raise and raised.tb_frame is caught.tb_frame
