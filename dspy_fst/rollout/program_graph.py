"""What a program holds, and where its parts stand: also in nested containers, objects and closures.

DSPy looks into attributes, lists and dicts alone. Nothing is copied or changed here. Three words are used throughout:

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
from collections.abc import Iterator, Mapping
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


class ProgramGraph:
    """Everything in a program that may lead to a part of it.

    ``nodes``: id -> object, the program first; ``holding``: those that are parts or hold one.

    Args:
        program: Where the walk begins.
        known: id -> object, for what is known to hold no part: it is not walked into.
    """

    def __init__(self, program: Any, known: Mapping[int, Any] = types.MappingProxyType({})):
        self._known = known
        self.nodes: dict[int, Any] = {id(program): program}
        self._holders: dict[int, list[int]] = {id(program): []}
        self._named: dict[int, tuple[int, str]] = {}
        self._walk(program)
        self.holding = self.reaching([key for key, node in self.nodes.items() if is_part(node)])

    def parts(self) -> dict[str, Any]:
        """Place -> part, the program's own place being ``""``; e.g. ``{"": program, "steps['a'][0]": step}``."""
        return {self.place(key): node for key, node in self.nodes.items() if is_part(node)}

    def place(self, key: int) -> str:
        """Where a node stands, e.g. ``steps['a'][0].ask``."""
        names: list[str] = []
        while key in self._named:
            key, name = self._named[key]
            names.append(name)
        return "".join(reversed(names)).lstrip(".")

    def is_within(self, key: int, others: Mapping[int, Any]) -> bool:
        """Whether a node stands inside of one of the others."""
        while key in self._named:
            key, _ = self._named[key]
            if key in others:
                return True
        return False

    def _walk(self, program: Any) -> None:
        """Depth first. What leads to nothing is forgotten at once: a million rows cost no million entries."""
        path = [(program, holds(program), [False])]
        while path:
            holder, held, leads = path[-1]
            for name, value in held:
                if id(value) in self._known or not may_hold(value):
                    continue
                leads[0] = True
                seen = id(value) in self.nodes
                self._holders.setdefault(id(value), []).append(id(holder))
                if not seen:
                    self.nodes[id(value)] = value
                    self._named[id(value)] = (id(holder), name)
                    path.append((value, holds(value), [False]))
                    break
            else:
                path.pop()
                if not (leads[0] or is_part(holder) or isinstance(holder, types.FunctionType)):
                    for of in (self.nodes, self._holders, self._named):
                        of.pop(id(holder), None)

    def reaching(self, keys: list[int]) -> dict[int, Any]:
        """The given nodes, and all that hold them at any depth."""
        found: dict[int, Any] = {}
        while keys:
            key = keys.pop()
            if key in self.nodes and key not in found:
                found[key] = self.nodes[key]
                keys += self._holders[key]
        return found


def all_predictors(program: dspy.Module, kinds: Any = dspy.Predict) -> list[Any]:
    """Every predictor of the program, or every part of the given classes, wherever it stands."""
    return [part for part in ProgramGraph(program).parts().values() if isinstance(part, kinds)]


def hidden_predictors(program: dspy.Module) -> dict[str, dspy.Predict]:
    """Place -> predictor that DSPy's ``named_parameters`` misses, e.g. in a dict of lists; frozen ones left out."""
    seen = {id(parameter) for _, parameter in program.named_parameters()}
    seen |= {id(inner) for _, inner in frozen_predictors(program)}
    parts = ProgramGraph(program).parts().items()
    return {place: part for place, part in parts if isinstance(part, dspy.Predict) and id(part) not in seen}


def frozen_predictors(program: dspy.Module) -> Iterator[tuple[str, dspy.Predict]]:
    """(place of a part that is marked ``_compiled``, predictor in it): DSPy leaves them out of ``named_parameters``."""
    for place, part in ProgramGraph(program).parts().items():
        if part is not program and getattr(part, "_compiled", False):
            yield from ((place, inner) for inner in all_predictors(part))
