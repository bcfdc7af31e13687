"""Values on their way to another process, by cloudpickle.

an engine's handle      travels as its number; at the other end the handle of that number stands in its place
a lock                  is a new one there, that nobody holds: each process has its own of what it guards
a batching of calls     is made again there, as in dspy.Embeddings: it is a thread
an LM's history         stays
a class of a notebook   travels along, unless it is there already: then that one stays as it is, but for what a run
                        begins with
"""

import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import IO, NamedTuple

import dspy
from dspy.dsp.utils.settings import DEFAULT_CONFIG
from dspy.utils.unbatchify import Unbatchify
from ray import cloudpickle
from ray.cloudpickle import cloudpickle as by_value

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


LOCKS: dict[type, Callable[[], object]] = {type(make()): make for make in (threading.Lock, threading.RLock)}
"""Class of a lock -> what makes one. Events, conditions, semaphores and queues are pickled with the locks they hold."""


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: IO[bytes], numbered: Numbered):
        super().__init__(file)
        self._numbered = numbered

    def persistent_id(self, value: object) -> HandleNumber | None:
        return self._numbered(value) if isinstance(value, EngineHandle) else None

    def reducer_override(self, value: object) -> object:  # type: ignore[override]  # one of the forms that pickle takes
        if (make := LOCKS.get(type(value))) is not None:
            return make, ()
        if isinstance(value, Unbatchify):
            return Unbatchify, (value.batch_fn, value.max_batch_size, value.max_wait_time)
        if isinstance(value, dspy.BaseLM):
            match value.__reduce_ex__(pickle.HIGHEST_PROTOCOL):
                case (make, arguments, {"history": [*_]} as state, *items):
                    return make, arguments, {**state, "history": []}, *items
        return super().reducer_override(value)


class _Unpickler(pickle.Unpickler):
    """Leaves classes alone that are here: cloudpickle would set their attributes to what they were elsewhere."""

    def __init__(self, file: IO[bytes], handle: Callable[[HandleNumber], EngineHandle], classes_too: bool):
        super().__init__(file)
        self._handle, self._classes_too = handle, classes_too
        self._new: set[type] = set()

    def persistent_load(self, number: HandleNumber) -> EngineHandle:
        return self._handle(number)

    def find_class(self, module: str, name: str) -> object:
        found = super().find_class(module, name)
        if self._classes_too or module != by_value.__name__:
            return found
        if name in ("_make_skeleton_class", "_make_skeleton_enum"):
            return partial(self._made, found)
        return self._filled if name == "_class_setstate" else found

    def _made(self, make: Callable[..., type], *arguments: object) -> type:
        *_, number, _ = arguments  # under which cloudpickle knows the class
        known = number in by_value._DYNAMIC_CLASS_TRACKER_BY_ID
        made = make(*arguments)
        if not known:
            self._new.add(made)
        return made

    def _filled(self, made: type, state: object) -> type:
        if made in self._new:
            by_value._class_setstate(made, state)
        return made


def packed(value: object, numbered: Numbered) -> bytes:
    """
    Raises:
        Exception: of many kinds, where something in the value cannot be pickled.
    """
    file = io.BytesIO()
    _Pickler(file, numbered).dump(value)
    return file.getvalue()


def unpacked(data: bytes, handle: Callable[[HandleNumber], EngineHandle], *, classes_too: bool = False) -> object:
    """The value again, with this process's handles in it.

    Args:
        classes_too: Whether classes of a notebook that are here become as they were sent, as for a run that begins in
            a worker of the one before.
    """
    value: object = _Unpickler(io.BytesIO(data), handle, classes_too).load()
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


def packed_error(error: BaseException) -> bytes:
    """An error that keeps its class, message and fields; one that cannot be pickled, or is no Exception, becomes an
    EngineError.

    Pickled as it is where that gives the same error again. Those of DSPy's lm15 hold a mapping proxy, which cannot be
    pickled, and the ``__init__`` of others takes something else than their ``args``.
    """
    fields = {name: dict(x) if isinstance(x, MappingProxyType) else x for name, x in vars(error).items()}
    for form in (error, (type(error), error.args, fields)) if isinstance(error, Exception) else ():
        with suppress(Exception):
            data = cloudpickle.dumps(form)
            again = unpacked_error(data)
            if (type(again), str(again)) == (type(error), str(error)):
                return data
    return cloudpickle.dumps(EngineError(f"{type(error).__name__}: {briefly(error)}"))


def unpacked_error(data: bytes) -> Exception:
    """The error again, without its traceback and causes."""
    sent = pickle.loads(data)
    if isinstance(sent, Exception):
        return sent
    kind, arguments, fields = sent
    error: Exception = kind.__new__(kind, *arguments)  # its __init__ may take other arguments than it keeps
    error.args = arguments
    vars(error).update(fields)
    return error


# ---- what cannot go ------------------------------------------------------------------------------


def shipping_faults(**values: object) -> Iterator[str]:
    """A sentence for each thing of a run that cannot be pickled, with its place.

    Args:
        **values: Name -> what is sent, e.g. the student. DSPy's settings are looked at, too.
    """
    values |= {f"dspy.settings.{name}": value for name, value in shipped_settings().items()}
    for name, value in values.items():
        if (why := why_not(value, name)) is not None:
            yield (
                f"{why}, and with the setting ray rollouts are made in other processes. Make it inside forward() or "
                "the metric, leave it out in a __getstate__, or leave out ray"
            )


def why_not(value: object, name: str) -> str | None:
    """Why a value of this name cannot be pickled, as a sentence; None where it can.

    >>> why_not({"rows": (row for row in [1, 2])}, "tool")
    "tool['rows']: a generator cannot be pickled (cannot pickle 'generator' object)"
    """
    if (error := _error_of(value)) is None:
        return None
    place, culprit = _culprit(value, name, DEEPEST)
    return f"{place}: a {type(culprit).__name__} cannot be pickled ({briefly(error)})"


def _error_of(value: object) -> Exception | None:
    try:
        with open(os.devnull, "wb") as nowhere:  # data may be large
            _Pickler(nowhere, lambda handle: HandleNumber(0, "", "")).dump(value)
    except Exception as error:  # any __reduce__ or __getstate__ may raise anything
        return error
    return None


def _culprit(value: object, place: str, levels: int) -> tuple[str, object]:
    """The innermost thing inside a value that cannot be pickled, and where it is."""
    for name, part in holds(value) if levels else ():
        if not is_atom(part) and _error_of(part) is not None:
            return _culprit(part, place + name, levels - 1)
    return place, value
