"""What an object holds, as far as a copy of a program must know: pure looking, nothing is copied or changed here.

Three words are used throughout:

    part        a dspy.Module or another DSPy parameter; a predictor is one
    container   a list, dict, set, tuple or deque, or a subclass of one
    plain       an object of a Python class whose state is all in ``__dict__`` and ``__slots__``
"""

import asyncio
import contextvars
import copyreg
import dataclasses
import enum
import functools
import gc
import io
import itertools
import logging
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import dspy
from dspy.predict.parameter import Parameter
from dspy.primitives.base_module import BaseModule
from pydantic import BaseModel

Held = tuple[str, Any]
"""(how the holder names it, e.g. ``".steps"`` or ``"[0]"``; what is held)."""

CONTAINERS = (list, dict, set, frozenset, tuple, deque)
RECORDS = frozenset(
    {
        "candidate_programs",
        "detailed_results",
        "full_eval_candidate_programs",
        "mb_candidate_programs",
        "population",
        "results_best",
        "results_latest",
        "trial_logs",
    }
)
"""Attributes in which optimizers (ours, DSPy 3.4's) leave their results. Programs in them are no part of this one."""


class Opaque:
    """Base of objects of ours that a program's copy holds and nobody looks into."""

    __slots__ = ()


_ATOMS = (
    Opaque,
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    type,
    types.ModuleType,
    types.CodeType,
    types.FrameType,
    types.TracebackType,
    types.GenericAlias,
    enum.Enum,
    PurePath,
    dspy.BaseLM,
    logging.Filterer,
    logging.LoggerAdapter,
    asyncio.AbstractEventLoop,
    contextvars.Context,
    contextvars.ContextVar,
)
"""Never looked into and never copied. An LM is a client: DSPy compares LMs by identity. Loggers, their handlers, event
loops and contexts belong to the process: what else of it they lead to is no part of the program."""
_STATES = (random.Random, itertools.count)
"""Of C classes those whose whole state is small and their own."""
_PROTOCOL = (
    "__copy__",
    "__deepcopy__",
    "__getnewargs__",
    "__getnewargs_ex__",
    "__getstate__",
    "__reduce__",
    "__reduce_ex__",
    "__setstate__",
)


_OF_DATACLASSES = [getattr(dataclasses, name, None) for name in ("_dataclass_getstate", "_dataclass_setstate")]
"""What ``@dataclass(frozen=True, slots=True)`` puts into a class: no rule of the user's, and all state is in slots."""


def is_part(x: Any) -> bool:
    return isinstance(x, BaseModule | Parameter)


def is_atom(x: Any) -> bool:
    """Whether it can hold no part and has no state that a rollout could change."""
    kind = type(x)
    return isinstance(x, _ATOMS) or kind is object or getattr(kind, "supports_decision_requests", False) is True


def is_plain(kind: type) -> bool:
    """Whether all state of the class's objects is in ``__dict__`` and ``__slots__``; as `copyreg` tells it."""
    makes = next(base for base in kind.__mro__ if getattr(base.__new__, "__self__", None) is base)
    return makes in (object, types.SimpleNamespace) and bool(kind.__dictoffset__ or hasattr(kind, "__slots__"))


def is_state(x: Any) -> bool:
    """Whether it is a small state of a C class, such as a generator of random numbers."""
    return isinstance(x, _STATES) or type(x).__module__.startswith("numpy.random")


def is_live(x: Any) -> bool:
    """Whether it stands for something outside itself, or ends something when it is collected: a lock, a file, a thread.

    Of C objects these are the ones that no copying protocol of Python's takes; arrays and tensors have one.
    """
    kind = type(x)
    if isinstance(x, io.IOBase | threading.Thread | weakref.ref) or hasattr(kind, "__del__"):
        return True
    if is_plain(kind) or isinstance(x, (*CONTAINERS, types.FunctionType, memoryview)):
        return False
    return not copies_itself(kind)


def copies_itself(kind: type) -> bool:
    """Whether the class says how its objects are copied or pickled."""
    known = (object, BaseModel)
    return any(
        all(rule is not getattr(base, name, None) for base in known)
        for name in _PROTOCOL
        if (rule := getattr(kind, name, None)) is not None and rule not in _OF_DATACLASSES
    )


def rebuilds_itself(x: Any) -> bool:
    """Whether a part or plain object makes its copy's attributes itself, as dspy.Flex does its bridge."""
    known = {getattr(base, "__setstate__", None) for base in (dspy.Module, BaseModel)}
    return getattr(type(x), "__setstate__", None) not in {*known, *_OF_DATACLASSES, None}


def attributes(x: Any) -> dict[str, Any]:
    """An object's own attributes, those in slots included."""
    slots = copyreg._slotnames(type(x))  # type: ignore[attr-defined]
    return {**getattr(x, "__dict__", {}), **{name: getattr(x, name) for name in slots if hasattr(x, name)}}


def state(x: Any) -> dict[str, Any]:
    """The attributes that a copy is made of. DSPy's records of calls and a module's callbacks stay behind, as in DSPy's
    own ``deepcopy``."""
    if rebuilds_itself(x):
        given = x.__getstate__()
        return given if isinstance(given, dict) else {"": given}
    own = attributes(x)
    if isinstance(x, BaseModule):
        fresh = [name for name in ("history", "callbacks") if isinstance(own.get(name), list)]
        own.update({name: [] for name in fresh})
    return own


def holds(x: Any) -> Iterator[Held]:
    """What an object holds: of parts, containers, plain objects and functions by name, of any other all that the
    garbage collector knows of."""
    if isinstance(x, dict):
        for key, value in x.items():
            yield f"[{key!r}]" if isinstance(key, str | int) else "[...]", value
            yield " (a key)", key
    elif isinstance(x, CONTAINERS):
        for index, value in enumerate(x):
            yield f"[{index}]", value
    yield from _behind(x)


def _behind(x: Any) -> Iterator[Held]:
    """What an object holds beside its items."""
    if is_part(x) or isinstance(x, CONTAINERS) or is_plain(type(x)):
        inside = state(x) if is_part(x) or is_plain(type(x)) else attributes(x)
        yield from ((f".{name}", value) for name, value in inside.items() if not (is_part(x) and name in RECORDS))
        yield from [(".default_factory", x.default_factory)] if hasattr(type(x), "default_factory") else []
    elif isinstance(x, types.FunctionType):
        names = x.__code__.co_freevars
        cells = dict(zip(names, x.__closure__ or (), strict=True))
        yield from ((f"'s {name}", content) for name, cell in cells.items() for content in gc.get_referents(cell))
        yield from (("'s default", value) for value in x.__defaults__ or ())
        yield from ((f"'s {name}", value) for name, value in {**(x.__kwdefaults__ or {}), **x.__dict__}.items())
    elif isinstance(x, types.MethodType):
        yield from ((".__self__", x.__self__), (".__func__", x.__func__))
    elif isinstance(x, functools.partial):
        yield from ((".func", x.func), (".args", x.args), (".keywords", x.keywords), (".__dict__", x.__dict__))
    elif isinstance(x, weakref.ref):
        yield "()", x()
    elif isinstance(x, types.MappingProxyType):
        yield from holds(dict(x))
    elif is_object_array(x):
        yield from (("[...]", value) for value in x.flat)
    else:
        yield from (("...", value) for value in gc.get_referents(x))


def is_object_array(x: Any) -> bool:
    """Whether it is a NumPy array of Python objects, into which the garbage collector does not look."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray) and x.dtype.hasobject


def may_hold(x: Any) -> bool:
    """Whether it is worth looking into: Python does not track what can hold nothing but atoms."""
    if gc.is_tracked(x):
        return not is_atom(x)
    return type(x) not in (str, int, float, dict, tuple) and is_object_array(x)


def globals_read(function: types.FunctionType) -> Iterator[Held]:
    """The module-level variables that a function reads, and what they are now."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)
