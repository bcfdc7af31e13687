"""Why copies of a program would share a predictor with it: every reason, found before any work.

There are three kinds of reasons. Python cannot copy an object that holds a part. A class has a copying method that does
not copy what its objects hold. Or the program's code reads a part from outside the program: from a global variable, an
enclosing function or a class. A copy has its own attributes and the same code, so such a predictor would be one for all
rollouts, whatever their texts, and DSPy does not name it.

To find the third kind, the code of some functions is read: functions that the program holds; ``forward`` and the
special methods of its classes; and the methods of its classes and functions of the same file that these name.
Constructors are left out, since there a program takes up what it holds. Only variables that the code names count, and
of a container its first `FIRST` values.
"""

import functools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import dspy

from dspy_fst.rollout.copying import copied, graph_faults
from dspy_fst.rollout.program_graph import (
    CONTAINERS,
    ProgramGraph,
    all_predictors,
    attributes,
    copies_itself,
    holds,
    is_part,
    is_plain,
    may_hold,
)

FIRST = 1_000
"""Values of a container that are looked at (ours: programs hold few parts)."""
_ENTRIES = ("forward", "aforward")
"""Methods that a rollout calls; the special methods other than these below are called, too."""
_CONSTRUCTION = (
    "__init__",
    "__new__",
    "__post_init__",
    "__init_subclass__",
    "__set_name__",
    "__copy__",
    "__deepcopy__",
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__del__",
    "__repr__",
    "__str__",
)
_LIBRARIES = {"dspy", "dspy_fst", "pydantic", "builtins", *sys.stdlib_module_names}


@dataclass(frozen=True)
class Outside:
    """A part that the program's code reads from outside the program."""

    reader: str
    """E.g. ``"Program.forward()"``."""
    variable: str
    """E.g. ``"global variable STEPS"``."""
    place: str
    """Where in the variable the part is, e.g. ``"global variable STEPS[0]"``."""
    part: object


Named: TypeAlias = tuple[str, object]
"""(what a message calls it, e.g. ``"global variable STEPS"``; its value)."""


@dataclass(frozen=True)
class _Function:
    name: str
    code: types.FunctionType
    is_in_program: bool
    """Whether the program holds the function. A copy then has a closure of its own for it."""


def copy_faults(program: dspy.Module) -> list[str]:
    """Why copies of the program would share a predictor with it, a sentence each. A copy is made and looked through."""
    graph = ProgramGraph(program)
    if faults := [*graph_faults(graph), *_outside_faults(graph)]:
        return faults
    try:
        parts = ProgramGraph(copied(program)).parts()
    except Exception as error:  # user classes are made and filled
        return [f"student: the program cannot be copied for its rollouts: {error!r}"]
    return [_shared_fault(graph, id(part)) for part in parts.values() if id(part) in graph.holding]


def _shared_fault(graph: ProgramGraph, part: int) -> str:
    sentence = f"student: a copy of the program shares {graph.place(part) or 'the program itself'} with it"
    if sharing := _copying_themselves(graph, part):
        whose = ", ".join(f"{place} (class {kind})" for place, kind in sharing.items())
        return (
            f"{sentence}, because the copying method (__deepcopy__, __copy__ or __reduce__) of {whose} "
            "does not copy what it holds: leave that method out, or let it copy.deepcopy(value, memo) every value that "
            "holds a module"
        )
    return f"{sentence}; hold it as an attribute"


def _copying_themselves(graph: ProgramGraph, key: int) -> dict[str, str]:
    """Place -> class, for every object that holds a node and whose class has a copying method of its own."""
    return {
        graph.place(above): type(node).__name__
        for above, node in graph.reaching([key]).items()
        if is_plain(type(node)) and not is_part(node) and copies_itself(type(node))
    }


def _outside_faults(graph: ProgramGraph) -> list[str]:
    """A sentence for each part of the program that its code reads from outside the program."""
    faults = []
    for found in _read_outside(graph):
        parts = ProgramGraph(found.part).parts().values()
        inside = next((key for part in parts if (key := id(part)) in graph.holding), None)
        if inside is not None:
            faults.append(
                f"student: {found.reader} reads the {found.variable}, which is or holds {_named(graph, inside)}, so "
                f"all copies of the program would call that one. {_advice(graph.place(inside))}"
            )
    return faults


def outside_predictors(program: dspy.Module) -> dict[str, dspy.Predict]:
    """Place -> predictor that only the program's code leads to, e.g. ``{"class attribute Program.steps[0]": ...}``."""
    graph = ProgramGraph(program)
    predictors = {found.place: p for found in _read_outside(graph) for p in all_predictors(found.part)}
    return {place: p for place, p in predictors.items() if id(p) not in graph.holding}


def _read_outside(graph: ProgramGraph) -> Iterator[Outside]:
    """Every part that code of the program reads from outside it, once for each function."""
    methods, values = _of_classes(graph)
    front = [
        _Function(f"the function at {graph.place(key)}", node, True)
        for key, node in graph.nodes.items()
        if isinstance(node, types.FunctionType)
    ]
    front += [method for name, found in methods.items() if _is_entry(name) for method in found]
    seen: set[int] = set()
    reported: set[tuple[_Function, int]] = set()
    while front:
        function = front.pop(0)
        if id(function.code) in seen:
            continue
        seen.add(id(function.code))
        names = _names(function.code)
        read = [*_variables(function, names), *(value for name in names for value in values.get(name, ()))]
        for variable, value in read:
            if isinstance(value, types.FunctionType):
                if value.__globals__ is function.code.__globals__:
                    front.append(_Function(f"{value.__name__}()", value, False))
                continue
            if function.is_in_program and is_part(value) and id(value) in graph.holding:
                continue  # graph_faults reports it
            for place, part in _parts_of(variable, value):
                if (function, id(part)) not in reported:
                    reported.add((function, id(part)))
                    yield Outside(function.name, variable, place, part)
        front += [method for name in names for method in methods.get(name, ())]


def _of_classes(graph: ProgramGraph) -> tuple[dict[str, list[_Function]], dict[str, list[Named]]]:
    """Name -> methods, and name -> class attributes, of the classes of the parts and of what holds them."""
    methods: dict[str, list[_Function]] = {}
    values: dict[str, list[Named]] = {}
    seen: set[tuple[int, str]] = set()
    for node in graph.holding.values():
        if not (is_part(node) or is_plain(type(node))):
            continue
        hidden = set(attributes(node))  # an object's own attributes come first
        for kind in type(node).__mro__:
            if kind.__module__.split(".")[0] in _LIBRARIES:
                continue
            for name, value in vars(kind).items():
                if name in hidden:
                    continue
                functions = _functions(value)
                if not any({"super", name} & set(_names(function)) for function in functions):
                    hidden.add(name)  # the base classes' method of this name is not called
                if (id(kind), name) in seen:
                    continue
                seen.add((id(kind), name))
                if functions:
                    found = [_Function(f"{kind.__name__}.{name}()", function, False) for function in functions]
                    methods.setdefault(name, []).extend(found)
                else:
                    values.setdefault(name, []).append((f"class attribute {kind.__name__}.{name}", value))
    return methods, values


def _functions(value: object) -> list[types.FunctionType]:
    """The functions behind an attribute of a class."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    inner: list[object] = [value]
    if isinstance(value, property):
        inner = [value.fget, value.fset]
    elif isinstance(value, functools.cached_property | functools.partialmethod):
        inner = [value.func]
    elif not is_part(value) and not isinstance(value, (*CONTAINERS, types.FunctionType, type)):
        inner = [getattr(value, "__wrapped__", None)]
    return [function for function in inner if isinstance(function, types.FunctionType)]


def _is_entry(name: str) -> bool:
    return name in _ENTRIES or (name.startswith("__") and name.endswith("__") and name not in _CONSTRUCTION)


def _names(function: types.FunctionType) -> list[str]:
    """The names of globals and attributes in the code of a function and of those within it; in order, each once."""
    codes, names = [function.__code__], {}
    while codes:
        code = codes.pop()
        names.update(dict.fromkeys(code.co_names))
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    return list(names)


def _variables(function: _Function, names: list[str]) -> Iterator[Named]:
    """The variables that a function reads apart from its arguments."""
    code, values = function.code, function.code.__globals__
    read: list[Named] = [(f"global variable {name}", values[name]) for name in names if name in values]
    if not function.is_in_program:
        free = code.__code__.co_freevars
        for place, value in holds(code):
            name = place.removeprefix("'s ")
            read.append((f"enclosing function's variable {name}" if name in free else "default of an argument", value))
    for variable, value in read:
        if isinstance(value, type | types.ModuleType):  # Registry.steps, prompts.ASK
            inside = vars(value)
            yield from ((f"{variable}.{name}", inside[name]) for name in names if name in inside)
        else:
            yield variable, value


def _parts_of(place: str, value: object) -> Iterator[Named]:
    """The value itself if it is a part, or the parts that a container holds, by place."""
    front: list[Named] = [(place, value)]
    seen: set[int] = set()
    while front and len(seen) < FIRST:
        place, x = front.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if is_part(x):
            yield place, x
        elif isinstance(x, CONTAINERS):
            front += [(place + name, inner) for name, inner in islice(holds(x), FIRST) if may_hold(inner)]


def _named(graph: ProgramGraph, key: int) -> str:
    return f"{graph.place(key)!r} of this program" if graph.place(key) else "the program itself"


def _advice(place: str) -> str:
    return f"Read it from the program: self.{place}" if place else "Use self"
