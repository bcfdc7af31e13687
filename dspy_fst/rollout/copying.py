"""Copies of a program for rollouts, requests and runs. A copy shares no predictor with its program, and all large data.

DSPy's own ``deepcopy`` shares what it cannot copy, *and the list or dict around it*: two "copies" then have one
predictor. Everything else it copies, even a retriever's index. Here the rules are:

    copied              parts (modules, predictors and other parameters of DSPy's), and everything that holds one:
                        containers, plain objects, tools, closures, partial functions. An object that the program holds
                        twice is one object in the copy, too.
    bound to the copy   methods of what is copied, e.g. ``program.forward`` set on the instance
    copied if small     containers and plain objects without parts, up to `SMALL` values. What one rollout writes into
                        ``self.seen = []`` is not read by another.
    by reference        everything else: arrays, indexes, LMs, functions, locks, files, connections; objects that hold
                        one of the last three at any depth; objects of more than `SMALL` values; results of optimizers

An object that holds a part and cannot be copied (a generator, a thread) is a fault: see `graph_faults`.
"""

import copy
import functools
import types
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Generic, TypeVar

import dspy

from dspy_fst.errors import ConfigurationError
from dspy_fst.rollout.copy_by_kind import Making, can_be_made
from dspy_fst.rollout.program_graph import (
    CONTAINERS,
    Opaque,
    ProgramGraph,
    copies_itself,
    globals_read,
    holds,
    is_atom,
    is_live,
    is_part,
    is_plain,
    is_state,
    may_hold,
)

T = TypeVar("T")
SMALL = 1_000
"""Most values, keys included, of a container or plain object without parts that is copied (ours: enough for notes, too
few for a corpus)."""
DEEPEST = 50
"""Most levels of such an object. Copying recurses once a level."""
METHODS = (types.MethodType, types.BuiltinMethodType, functools.partial)
OUTER = (list, dict, set)


def copied(program: T) -> T:
    """A copy of a program, which itself is unchanged.

    Raises:
        ConfigurationError: a copy would share a predictor with the program (see `graph_faults`).
    """
    return Copier(program).copy()


class Copier(Generic[T]):
    """Makes copies of one program, which must not change between them.

    The program is walked through once, so each copy costs what is copied and not what is held.

    Args:
        program: What is copied.
        known: id -> object, for objects that are passed by reference and not entered.

    Raises:
        ConfigurationError: a copy would share a predictor with the program (see `graph_faults`).
    """

    def __init__(self, program: T, known: Mapping[int, object] = types.MappingProxyType({})):
        graph = ProgramGraph(program, known)
        if faults := graph_faults(graph):
            raise ConfigurationError(faults)
        self._program, self._known = program, known
        self._chosen: dict[int, object] = {**_small(graph.holding, known), **graph.holding}

    def copy(self, *, lean: bool = False) -> T:
        """One copy.

        Args:
            lean: Whether modules that copy their parts while they run (dspy.BestOfN, dspy.Refine) copy by these rules,
                too, without another walk through what the copies share.
        """
        making = Making(self._chosen)
        new: T = making(self._program)
        if lean:
            modules = [
                making.memo[key] for key, x in self._chosen.items() if isinstance(x, dspy.Module) and key in making.memo
            ]
            for module in modules:
                module.__dict__["deepcopy"] = types.MethodType(self._again, module)
        return new

    @cached_property
    def _again(self) -> "_Again":
        return _Again(self._known, self._chosen)


class _Again(Opaque):
    """Copies a part of a copy. The part may have changed since, so it is walked again, down to what is shared."""

    __slots__ = ("_known",)

    def __init__(self, known: Mapping[int, object], chosen: Mapping[int, object]):
        contents = (x for holder in chosen.values() for _, x in holds(holder))
        shared = {id(x): x for x in contents if id(x) not in chosen and may_hold(x)}
        self._known = {**known, **shared}

    def __call__(self, part: T) -> T:
        return Copier(part, self._known).copy(lean=True)


def graph_faults(graph: ProgramGraph) -> list[str]:
    """Why copies of the program would share a part with it, a sentence for each reason.

    These reasons can be seen in the program itself. `dspy_fst.rollout.copy_faults` also tells those that only its code,
    or a copy, shows.
    """
    all_stuck = {key: node for key, node in graph.holding.items() if not can_be_made(node)}
    stuck = {key: node for key, node in all_stuck.items() if not graph.is_within(key, all_stuck)}  # a generator's cells
    faults = [
        f"student: {graph.place(key)} is a {type(node).__name__} that holds {_part_in(graph, key)}, and it cannot be "
        "copied: rollouts under other texts would share that module. Make it inside forward(), or hold the module "
        "beside it, as an attribute, or in a list or dict"
        for key, node in stuck.items()
    ]
    for key, node in graph.nodes.items():
        if isinstance(node, types.FunctionType):
            faults += [
                f"student: the function at {graph.place(key)} reads the global variable {name!r}, which is a module "
                "of this program, so its copies would all call that one. Pass the module to the function, "
                "or make it a method"
                for name, value in dict(globals_read(node)).items()
                if is_part(value) and id(value) in graph.holding
            ]
    return faults


def _part_in(graph: ProgramGraph, key: int) -> str:
    below = next(k for k, node in graph.nodes.items() if is_part(node) and key in graph.reaching([k]))
    return graph.place(below) or "the program itself"


def _small(holding: Mapping[int, object], known: Mapping[int, object]) -> dict[int, object]:
    """id -> object, for the objects without parts that are copied because they are small.

    Args:
        holding: id -> object, for the parts and what holds them. What these hold is looked at.
    """
    passed = {**known, **holding}
    chosen: dict[int, object] = {}
    shared: set[int] = set()
    for holder in holding.values():
        if isinstance(holder, types.FunctionType):
            continue  # a closure's variables are its surroundings, which DSPy's deepcopy shares, too
        for _, x in holds(holder):
            if is_atom(x) or id(x) in passed or id(x) in chosen:
                continue
            value = _Value(x, passed)
            if value.large and isinstance(holder, dspy.Predict) and type(x) in OUTER:
                chosen[id(x)] = x  # a rollout may add a demo
            elif not value.large:
                shared |= value.shared()
                chosen |= value.open()
    return {key: x for key, x in chosen.items() if key not in shared}


class _Value:
    """An object without parts and all that it holds: id -> object, and which holds which."""

    def __init__(self, value: object, known: Mapping[int, object]):
        self.nodes: dict[int, object] = {id(value): value}
        self._holders: dict[int, list[int]] = {id(value): []}
        self._held: dict[int, list[int]] = {}
        self.large = not self._walk(value, known)

    def _walk(self, value: object, known: Mapping[int, object]) -> bool:
        """Whether the walk came to its end within `SMALL` values and `DEEPEST` levels."""
        count, front = 0, [(value, 0)]
        while front:
            holder, depth = front.pop()
            for _, x in holds(holder) if _is_open(holder) else ():
                count += 1
                if count > SMALL or depth > DEEPEST:
                    return False
                if is_atom(x) or id(x) in known:
                    continue
                self._holders.setdefault(id(x), []).append(id(holder))
                self._held.setdefault(id(holder), []).append(id(x))
                if id(x) not in self.nodes:
                    self.nodes[id(x)] = x
                    front.append((x, depth + 1))
        return True

    def open(self) -> dict[int, object]:
        """The objects of which a copy would be made."""
        return {key: x for key, x in self.nodes.items() if _is_open(x) or is_state(x)}

    def shared(self) -> set[int]:
        """The objects that are passed by reference, with all that they hold."""
        return self._closure(self._shared_objects(), self._held)

    def _shared_objects(self) -> list[int]:
        """Objects that are live or hold what is live, and objects whose own copying method may be expensive."""
        resources = [key for key, x in self.nodes.items() if is_live(x) and not is_plain(type(x))]
        holding = self._closure(resources, self._holders)  # a semaphore holds a condition, which holds a lock
        shared = []
        for key, x in self.nodes.items():
            if is_plain(type(x)) and copies_itself(type(x)):
                shared += [] if self._copies_cheaply(key) else [key]
            elif is_plain(type(x)) and (key in holding or is_live(x)):
                shared.append(key)
        return shared

    def _copies_cheaply(self, key: int) -> bool:
        inside = [self.nodes[inner] for inner in self._closure([key], self._held)]
        if not all(_is_open(x) or is_state(x) or is_live(x) for x in inside):
            return False  # an array or an index, which its method may well copy
        try:
            copy.deepcopy(self.nodes[key])
        except Exception:
            return False
        return True

    def _closure(self, keys: Iterable[int], step: Mapping[int, list[int]]) -> set[int]:
        """The keys, and those that are reached from them."""
        found: set[int] = set()
        front = list(keys)
        while front:
            key = front.pop()
            if key not in found:
                found.add(key)
                front += step.get(key, [])
        return found


def _is_open(x: object) -> bool:
    """Whether a copy of an object is made of copies of what it holds."""
    return isinstance(x, (*CONTAINERS, *METHODS)) or is_plain(type(x))
