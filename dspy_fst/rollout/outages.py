"""Outages inside a rollout: noticed where they happen, with what became of each.

An LM that fails, or a tool that cannot be reached, raises where it is called. Then one of three things happens:

- The exception ends the program. It says all that is needed (see `dspy_fst.rollout.outcome_rules`).
- The program catches it, and asks again or goes on without. What comes after is measured. An agent that reads of the
  failure in words (dspy.ReAct) goes on in the same way.
- DSPy catches it and leaves a hole: dspy.Parallel puts None in the place of a result, BestOfN and Refine return no
  prediction, a task or a future keeps an exception that nobody reads. If the program then fails because of the hole,
  the policy is not at fault.

Which of them it was is read from the exception's traceback when the rollout is over. The outermost frame belongs to the
code that caught the exception, or to the coroutine that it ended.
"""

import dis
import inspect
from collections.abc import Iterator, Mapping
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
"""Modules of DSPy 3.4 and of Python that keep an exception to themselves. The last five start tasks and threads: an
exception whose outermost frame is theirs stayed in an asyncio.gather(return_exceptions=True), a future or a thread."""
TRIES = ("dspy.predict.best_of_n", "dspy.predict.refine")
"""Those of them that try again. There is no hole if a later try gave a prediction."""
RAISES = ("RERAISE", "RAISE_VARARGS")
"""CPython's instructions that raise."""
GONE = {
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "aiohttp": ("ClientConnectionError",),
    "openai": ("APIConnectionError",),
    "urllib3": ("MaxRetryError", "ProtocolError", "TimeoutError"),
}
"""Package -> its exception classes for a server that does not answer, apart from those that are an OSError. litellm
raises openai's classes."""
OF_THE_CALLER = ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL")
"""Subclasses of those in `GONE` that mean that the request itself is wrong."""
TOO_MANY_REQUESTS = 429


class Outages(BaseCallback):
    """DSPy's callback during one rollout: notes each failure of an LM or a tool."""

    def __init__(self) -> None:
        self._recorded: dict[str, bool] = {}
        """Call that runs -> whether it is one of the policy, whose calls are recorded."""
        self._seen: list[tuple[str, BaseException]] = []
        """(reason for a mask, exception)."""

    def on_lm_start(self, call_id: str, instance: object, inputs: Mapping[str, object]) -> None:
        self._recorded[call_id] = is_recorded(instance)

    def on_lm_end(self, call_id: str, outputs: object, exception: BaseException | None = None) -> None:
        recorded = self._recorded.pop(call_id, False)
        if exception is None or (recorded and not _is_an_lm_s(exception)):
            return  # a prompt that overflows the policy's context, or cannot be rendered at all, is no outage
        who = "lm" if recorded else "frozen lm"
        self._seen.append((f"{who}: {type(exception.__cause__ or exception).__name__}", exception))

    def on_tool_end(self, call_id: str, outputs: object, exception: BaseException | None = None) -> None:
        self._look(exception)

    def on_module_start(self, call_id: str, instance: object, inputs: Mapping[str, Any]) -> None:
        if isinstance(instance, dspy.Predict) and hasattr(instance, PREDICTOR_TAG):
            lm = (inputs.get("kwargs") or {}).get("lm") or instance.lm or dspy.settings.lm
            self._recorded[call_id] = is_recorded(lm)

    def on_module_end(self, call_id: str, outputs: object, exception: BaseException | None = None) -> None:
        recorded = self._recorded.pop(call_id, True)
        if isinstance(exception, AdapterParseError) and not recorded:
            self._seen.append((f"frozen lm: {type(exception).__name__}", exception))
        else:
            self._look(exception, "lm" if recorded else "frozen lm")

    def _look(self, exception: BaseException | None, who: str = "lm") -> None:
        if exception is not None and not self._is_known(exception) and (reason := self.cause_of(exception, who)):
            self._seen.append((reason, exception))

    def _is_known(self, error: BaseException) -> bool:
        return any(error is seen for _, seen in self._seen)

    def cause_of(self, error: BaseException, who: str = "lm") -> str | None:
        """The outage that an exception is or was raised from, as the reason for a mask; else None.

        Args:
            error: The exception.
            who: Whose LM failed, if it was an LM and the exception was not seen before.
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
        """The outage that kept the rollout from its result, as the reason for a mask; else None.

        Args:
            error: The exception that ended the program; None if it ended without a result.
        """
        if error is not None and (reason := self.cause_of(error)):
            return reason
        tripped_over = getattr(error, "obj", None)  # an AttributeError's object without the attribute
        if isinstance(tripped_over, BaseException) and (reason := self.cause_of(tripped_over)):
            return reason
        return next((reason for reason, seen in self._seen if leaves_a_hole(seen)), None)

    def forget(self) -> None:
        """Drop the exceptions, whose tracebacks hold the rollout's copy of the program."""
        self._seen.clear()


def _is_an_lm_s(error: BaseException) -> bool:
    overflow = isinstance(error, ContextWindowExceededError)
    return isinstance(error, LMError | EngineError | OSError) and not overflow


def leaves_a_hole(error: BaseException) -> bool:
    """Whether DSPy, a task or a thread kept an exception to itself, and put nothing in the place of the result."""
    if error.__traceback__ is None:
        return False
    frame: FrameType = error.__traceback__.tb_frame
    where = frame.f_globals.get("__name__")
    if where in TRIES:
        return frame.f_locals.get("best_pred") is None
    return where in LEAVES_A_HOLE or _ended_a_coroutine(error.__traceback__)


def _ended_a_coroutine(outermost: TracebackType) -> bool:
    """Whether the exception ended a coroutine, and so stayed in its task.

    The coroutine's last instruction is then the one that raised, or one that raises again after a ``finally`` or in an
    ``except``. A coroutine that handled the exception ended on another instruction.
    """
    frame = outermost.tb_frame
    if not frame.f_code.co_flags & inspect.CO_COROUTINE or frame.f_lasti < 0:
        return False
    return frame.f_lasti == outermost.tb_lasti or dis.opname[frame.f_code.co_code[frame.f_lasti]] in RAISES


# ---- what an exception says about itself -----------------------------------------------------------


def is_a_network_fault(error: BaseException) -> bool:
    """Whether a server could not be reached, or answered that it is busy (429) or broken (5xx).

    This is read from names and attributes, since the clients (httpx, requests, aiohttp, openai, litellm) need not be
    installed.
    """
    if isinstance(error, OSError):
        return True
    known = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__]
    if any(name in OF_THE_CALLER for _, name in known):
        return False
    return any(name in GONE.get(package, ()) for package, name in known) or _has_such_a_status(error)


def _has_such_a_status(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    given = [getattr(holder, name, None) for holder in (error, response) for name in ("status_code", "status")]
    return any(type(status) is int and (status == TOO_MANY_REQUESTS or 500 <= status < 600) for status in given)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, those in its group, and those that it was raised from. Each comes once."""
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
    """Whether an exception was raised in the place of its context: by a ``raise`` in the function that caught that.

    Any other exception while one is handled, e.g. in a second try, is a failure of its own.
    """
    raised = error.__traceback__
    caught = error.__context__.__traceback__ if error.__context__ is not None else None
    if raised is None or caught is None:
        return False
    while raised.tb_next is not None:
        raised = raised.tb_next
    is_a_raise = raised.tb_frame.f_code.co_code[raised.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_a_raise and raised.tb_frame is caught.tb_frame
