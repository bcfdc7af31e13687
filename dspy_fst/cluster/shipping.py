"""Values on their way to another process: by cloudpickle, but for the engines of policies, which stay where they are.

An engine's handle travels as its number. At the other end the handle of that number stands in its place.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import NamedTuple

import dspy
from dspy.dsp.utils.settings import DEFAULT_CONFIG
from ray import cloudpickle

from dspy_fst.errors import EngineError, briefly
from dspy_fst.policy_lm import EngineHandle
from dspy_fst.rollout.program_graph import holds, is_atom

STAY = frozenset({"caller_modules", "caller_predict", "send_stream", "stream_listeners", "trace", "usage_tracker"})
"""Settings of DSPy's context that belong to the call in progress, and so to the process that makes it."""
DEEPEST = 30
"""Levels that are searched for what cannot be pickled (ours)."""


class HandleNumber(NamedTuple):
    """What stands for an engine's handle on the way."""

    number: int
    folder: str
    """Of its weights when it was sent."""
    version: str


Numbered = Callable[[EngineHandle], HandleNumber | None]
"""The number of a handle; None for one that goes along as it is."""


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, numbered: Numbered):
        super().__init__(file)
        self._numbered = numbered

    def persistent_id(self, value: object) -> HandleNumber | None:
        return self._numbered(value) if isinstance(value, EngineHandle) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, handle: Callable[[HandleNumber], EngineHandle]):
        super().__init__(file)
        self._handle = handle

    def persistent_load(self, number: HandleNumber) -> EngineHandle:
        return self._handle(number)


def packed(value: object, numbered: Numbered) -> bytes:
    """
    Raises:
        Exception: of many kinds, where something in the value cannot be pickled.
    """
    file = io.BytesIO()
    _Pickler(file, numbered).dump(value)
    return file.getvalue()


def unpacked(data: bytes, handle: Callable[[HandleNumber], EngineHandle]) -> object:
    """The value again, with this process's handles in it."""
    value: object = _Unpickler(io.BytesIO(data), handle).load()
    return value


def shipped_settings() -> dict[str, object]:
    """DSPy's settings in force that differ from its defaults, and apply to rollouts elsewhere, too."""
    given = dspy.settings.copy()
    return {
        name: value
        for name, value in given.items()
        if name not in STAY and (name not in DEFAULT_CONFIG or value is not DEFAULT_CONFIG[name])
    }


# ---- errors --------------------------------------------------------------------------------------


def packed_error(error: Exception) -> bytes:
    """An error that keeps its class, message and fields; one that cannot be pickled becomes an EngineError.

    Not pickled as it is: errors of DSPy's lm15 hold a mapping proxy, which cannot be.
    """
    fields = {name: dict(x) if isinstance(x, MappingProxyType) else x for name, x in vars(error).items()}
    try:
        return cloudpickle.dumps((type(error), error.args, fields))
    except Exception:
        return cloudpickle.dumps((EngineError, (f"{type(error).__name__}: {briefly(error)}",), {}))


def unpacked_error(data: bytes) -> Exception:
    """The error again, without its traceback and causes."""
    kind, arguments, fields = pickle.loads(data)
    error: Exception = kind.__new__(kind, *arguments)  # its __init__ may take other arguments than it keeps
    error.args = arguments
    vars(error).update(fields)
    return error


# ---- what cannot go ------------------------------------------------------------------------------


def shipping_faults(student: object, metric: object) -> Iterator[str]:
    """A sentence for each thing of a run that cannot be pickled, with its place."""
    values = {"student": student, "metric": metric}
    values |= {f"dspy.settings.{name}": value for name, value in shipped_settings().items()}
    for name, value in values.items():
        if (error := _why_not(value)) is not None:
            place, culprit = _culprit(value, name, DEEPEST)
            yield (
                f"{place}: a {type(culprit).__name__} cannot be pickled ({briefly(error)}), and with the setting ray "
                "rollouts are made in other processes. Make it inside forward() or the metric, leave it out in a "
                "__getstate__, or leave out ray"
            )


def _why_not(value: object) -> Exception | None:
    try:
        packed(value, lambda handle: HandleNumber(0, "", ""))
    except Exception as error:  # any __reduce__ or __getstate__ may raise anything
        return error
    return None


def _culprit(value: object, place: str, levels: int) -> tuple[str, object]:
    """The innermost thing inside a value that cannot be pickled, and where it is."""
    for name, part in holds(value) if levels else ():
        if not is_atom(part) and _why_not(part) is not None:
            return _culprit(part, place + name, levels - 1)
    return place, value
