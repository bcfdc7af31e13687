"""What a program holds, and where its parts are. Nothing is copied or changed here.

DSPy finds parts in attributes, lists and dicts only. The walk here also enters nested containers, objects of other
classes, and closures. Three words have a fixed meaning:

    part        a dspy.Module, or another parameter of DSPy's; every predictor is a part
    container   a list, dict, set, tuple or deque, or an object of a subclass
    plain       an object of a Python class whose whole state is in ``__dict__`` and ``__slots__``
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
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import dspy
from dspy.predict.parameter import Parameter
from dspy.primitives.base_module import BaseModule
from pydantic import BaseModel

if TYPE_CHECKING:
    import numpy as np

Speaker: TypeAlias = dspy.Predict | dspy.Flex
"""A part that holds an LM."""
Held = tuple[str, object]
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
"""Attributes in which optimizers (this package's and those of DSPy 3.4) leave their results. The programs in them are
no parts of this one."""


class Opaque:
    """Base class of this package's own objects that a copy of a program holds. The walk never enters them."""

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
"""Never entered and never copied. An LM is a client, and DSPy compares LMs by identity. Loggers, handlers, event loops
and contexts belong to the process: what they lead to is not part of the program."""
_STATES = (random.Random, itertools.count)
"""Classes written in C whose whole state is small and belongs to the object alone."""
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
"""Methods by which a class says how its objects are copied or pickled."""
_OF_DATACLASSES = [getattr(dataclasses, name, None) for name in ("_dataclass_getstate", "_dataclass_setstate")]
"""What ``@dataclass(frozen=True, slots=True)`` adds to a class. It is no rule of the user's: all state is in slots."""


def is_part(x: object) -> bool:
    """Whether an object is a module or another parameter of DSPy's."""
    return isinstance(x, BaseModule | Parameter)


def is_atom(x: object) -> bool:
    """Whether an object can hold no part and has no state that a rollout could change."""
    kind = type(x)
    return isinstance(x, _ATOMS) or kind is object or getattr(kind, "supports_decision_requests", False) is True


def is_plain(kind: type) -> bool:
    """Whether the whole state of a class's objects is in ``__dict__`` and ``__slots__``, by the rule of `copyreg`."""
    makes = next(base for base in kind.__mro__ if getattr(base.__new__, "__self__", None) is base)
    return makes in (object, types.SimpleNamespace) and bool(kind.__dictoffset__ or hasattr(kind, "__slots__"))


def is_state(x: object) -> bool:
    """Whether an object of a C class is nothing but a small state, such as a random number generator."""
    return isinstance(x, _STATES) or type(x).__module__.startswith("numpy.random")


def is_live(x: object) -> bool:
    """Whether an object stands for something outside itself, or ends something when it is collected.

    Locks, files and threads are live. An object of a C class counts as live if it has no copying method; arrays and
    tensors have one.
    """
    kind = type(x)
    if isinstance(x, io.IOBase | threading.Thread | weakref.ref) or hasattr(kind, "__del__"):
        return True
    if is_plain(kind) or isinstance(x, (*CONTAINERS, types.FunctionType, memoryview)):
        return False
    return not copies_itself(kind)


def copies_itself(kind: type) -> bool:
    """Whether a class says itself how its objects are copied or pickled."""
    known = (object, BaseModel)
    return any(
        all(rule is not getattr(base, name, None) for base in known)
        for name in _PROTOCOL
        if (rule := getattr(kind, name, None)) is not None and rule not in _OF_DATACLASSES
    )


def rebuilds_itself(x: object) -> bool:
    """Whether a part or plain object sets the attributes of its copy itself, as dspy.Flex does with its bridge."""
    known = {getattr(base, "__setstate__", None) for base in (dspy.Module, BaseModel)}
    return getattr(type(x), "__setstate__", None) not in {*known, *_OF_DATACLASSES, None}


def attributes(x: object) -> dict[str, object]:
    """An object's own attributes, those in slots included."""
    slots = copyreg._slotnames(type(x))  # type: ignore[attr-defined]
    return {**getattr(x, "__dict__", {}), **{name: getattr(x, name) for name in slots if hasattr(x, name)}}


def state(x: object) -> dict[str, object]:
    """The attributes that a copy gets. A module's history and callbacks become empty, as in DSPy's ``deepcopy``.

    The one entry ``""`` stands for a state that is no dict, of a class with a ``__setstate__`` of its own.
    """
    if rebuilds_itself(x):
        given: object = x.__getstate__()
        return given if isinstance(given, dict) else {"": given}
    values = attributes(x)
    if isinstance(x, BaseModule):
        fresh = [name for name in ("history", "callbacks") if isinstance(values.get(name), list)]
        values.update({name: [] for name in fresh})
    return values


def holds(x: object) -> Iterator[Held]:
    """What an object holds, with its names.

    Parts, containers, plain objects and functions name what they hold. Of any other object the garbage collector says
    what it refers to.
    """
    if isinstance(x, dict):
        for key, value in x.items():
            yield f"[{key!r}]" if isinstance(key, str | int) else "[...]", value
            yield " (a key)", key
    elif isinstance(x, CONTAINERS):
        for index, value in enumerate(x):
            yield f"[{index}]", value
    yield from _behind(x)


def _behind(x: object) -> Iterator[Held]:
    """What an object holds apart from its items."""
    if is_part(x) or isinstance(x, CONTAINERS) or is_plain(type(x)):
        inside = state(x) if is_part(x) or is_plain(type(x)) else attributes(x)
        yield from ((f".{name}", value) for name, value in inside.items() if not (is_part(x) and name in RECORDS))
        if hasattr(type(x), "default_factory"):
            yield ".default_factory", getattr(x, "default_factory")  # noqa: B009 (of a subclass of dict alone)
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


def is_object_array(x: object) -> "TypeGuard[np.ndarray]":
    """Whether an object is a NumPy array of Python objects. The garbage collector does not look into these."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray) and x.dtype.hasobject


def may_hold(x: object) -> bool:
    """Whether an object may hold a part. Python's garbage collector does not track objects that hold only atoms."""
    if gc.is_tracked(x):
        return not is_atom(x)
    return type(x) not in (str, int, float, dict, tuple) and is_object_array(x)


def globals_read(function: types.FunctionType) -> Iterator[Held]:
    """The global variables that a function reads, with their present values."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)


class ProgramGraph:
    """Every object in a program that may lead to a part of it.

    ``nodes``: id -> object, the program first. ``holding``: the nodes that are parts or hold one at any depth.

    Args:
        program: Where the walk begins.
        known: id -> object, for objects that are known to hold no part. The walk does not enter them.
    """

    def __init__(self, program: object, known: Mapping[int, object] = types.MappingProxyType({})):
        self._known = known
        self.nodes: dict[int, object] = {id(program): program}
        self._holders: dict[int, list[int]] = {id(program): []}
        self._named: dict[int, tuple[int, str]] = {}
        """Node -> the holder through which it was found first, and how that names it."""
        self._walk(program)
        self.holding = self.reaching([key for key, node in self.nodes.items() if is_part(node)])

    def parts(self) -> dict[str, object]:
        """Place -> part, e.g. ``{"": program, "steps['a'][0]": step}``. The program's own place is ``""``."""
        return {self.place(key): node for key, node in self.nodes.items() if is_part(node)}

    def place(self, key: int) -> str:
        """Where a node is, e.g. ``steps['a'][0].ask``."""
        names: list[str] = []
        while key in self._named:
            key, name = self._named[key]
            names.append(name)
        return "".join(reversed(names)).lstrip(".")

    def is_within(self, key: int, others: Mapping[int, object]) -> bool:
        """Whether a node was found inside one of the others."""
        while key in self._named:
            key, _ = self._named[key]
            if key in others:
                return True
        return False

    def _walk(self, program: object) -> None:
        """Depth first. A node that leads to nothing is dropped at once: a million rows cost no million entries."""
        path = [(program, holds(program), [False])]
        while path:
            holder, contents, leads = path[-1]
            for name, value in contents:
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
                    self.nodes.pop(id(holder), None)
                    self._holders.pop(id(holder), None)
                    self._named.pop(id(holder), None)

    def reaching(self, keys: list[int]) -> dict[int, object]:
        """The given nodes, and every node that holds one of them at any depth."""
        found: dict[int, object] = {}
        while keys:
            key = keys.pop()
            if key in self.nodes and key not in found:
                found[key] = self.nodes[key]
                keys += self._holders[key]
        return found


def all_predictors(program: object) -> list[dspy.Predict]:
    """Every predictor of the program, wherever it is."""
    return [part for part in ProgramGraph(program).parts().values() if isinstance(part, dspy.Predict)]


def all_speakers(program: object) -> list[Speaker]:
    """Every part of the program that holds an LM, wherever it is."""
    return [part for part in ProgramGraph(program).parts().values() if isinstance(part, dspy.Predict | dspy.Flex)]


def hidden_predictors(program: dspy.Module) -> dict[str, dspy.Predict]:
    """Place -> predictor that DSPy's ``named_parameters`` misses, e.g. in a dict of lists. Frozen ones are left out."""
    seen = {id(parameter) for _, parameter in program.named_parameters()}
    seen |= {id(inner) for _, inner in frozen_predictors(program)}
    parts = ProgramGraph(program).parts().items()
    return {place: part for place, part in parts if isinstance(part, dspy.Predict) and id(part) not in seen}


def frozen_predictors(program: dspy.Module) -> Iterator[tuple[str, dspy.Predict]]:
    """(place of a part marked ``_compiled``, predictor in it). DSPy leaves these out of ``named_parameters``."""
    for place, part in ProgramGraph(program).parts().items():
        if part is not program and getattr(part, "_compiled", False):
            yield from ((place, inner) for inner in all_predictors(part))
