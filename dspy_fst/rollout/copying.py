"""Copies of a program: for a rollout, for a request, for a run. They share no predictor with it, and all of its data.

DSPy's own ``deepcopy`` shares what it cannot copy *and the list or dict around it*, so that two "copies" speak with one
predictor; and it copies everything else, a retriever's index included. Here:

    copied always       parts (modules, predictors and DSPy's other parameters) and whatever holds one: containers,
                        plain objects, tools, closures, partial functions. What the program holds once, a copy holds
                        once.
    bound anew          methods of what is copied, e.g. ``program.forward`` set on the instance
    copied while small  containers and plain objects that hold no part, up to `SMALL` values: what one rollout writes
                        into ``self.seen = []`` no other rollout reads
    by reference        everything else: arrays, indexes, LMs, functions, locks, files, connections; objects that hold
                        one of the last three at any depth; what has more than `SMALL` values; results of optimizers

What holds a part and cannot be copied (a generator, a thread) is a fault: `dspy_fst.rollout.copy_faults` tells all.
"""

import copy
import functools
import types
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

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

SMALL = 1_000
"""Values, keys counted, up to which a container or plain object without parts is copied (ours: notes, no corpus)."""
DEEPEST = 50
"""Levels of such a value; a copy goes down a level a call."""
METHODS = (types.MethodType, types.BuiltinMethodType, functools.partial)
OUTER = (list, dict, set)


def copied(program: Any) -> Any:
    """A copy of a program; the program is left as it is.

    Raises:
        ConfigurationError: a copy would share a predictor with the program (see `graph_faults`).
    """
    return Copier(program).copy()


class Copier:
    """Makes copies of one program. It looks through the program once, so a copy costs what is copied, not what is held.

    The program must not change between the copies.

    Args:
        program: What is copied.
        known: id -> object, for what is passed by reference without a look into it.

    Raises:
        ConfigurationError: a copy would share a predictor with the program (see `graph_faults`).
    """

    def __init__(self, program: Any, known: Mapping[int, Any] = types.MappingProxyType({})):
        graph = ProgramGraph(program, known)
        if faults := graph_faults(graph):
            raise ConfigurationError(faults)
        self._program, self._known = program, known
        self._chosen: dict[int, Any] = {**_small(graph.holding, known), **graph.holding}

    def copy(self, *, lean: bool = False) -> Any:
        """One copy.

        Args:
            lean: Whether modules that copy their parts while they run (dspy.BestOfN, dspy.Refine) do it like this, and
                without another walk through what the copies share.
        """
        making = Making(self._chosen)
        made = making(self._program)
        if lean:
            modules = [
                making.memo[key] for key, x in self._chosen.items() if isinstance(x, dspy.Module) and key in making.memo
            ]
            for module in modules:
                module.__dict__["deepcopy"] = types.MethodType(self._again, module)
        return made

    @cached_property
    def _again(self) -> "_Again":
        return _Again(self._known, self._chosen)


class _Again(Opaque):
    """Copies a part of a copy. Such a part may have changed since, so it is looked through, down to what is shared."""

    __slots__ = ("_known",)

    def __init__(self, known: Mapping[int, Any], chosen: Mapping[int, Any]):
        held = (x for holder in chosen.values() for _, x in holds(holder))
        shared = {id(x): x for x in held if id(x) not in chosen and may_hold(x)}
        self._known = {**known, **shared}

    def __call__(self, part: Any) -> Any:
        return Copier(part, self._known).copy(lean=True)


def graph_faults(graph: ProgramGraph) -> list[str]:
    """Why copies of what the graph shows would share a part with it; empty when they would not."""
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
                "of this program, so its copies would all speak with that one. Pass the module to the function, "
                "or make it a method"
                for name, value in dict(globals_read(node)).items()
                if is_part(value) and id(value) in graph.holding
            ]
    return faults


def _part_in(graph: ProgramGraph, key: int) -> str:
    below = next(k for k, node in graph.nodes.items() if is_part(node) and key in graph.reaching([k]))
    return graph.place(below) or "the program itself"


def _small(holding: Mapping[int, Any], known: Mapping[int, Any]) -> dict[int, Any]:
    """id -> object, for what is copied of the values without parts that parts, and what holds parts, hold."""
    passed = {**known, **holding}
    chosen: dict[int, Any] = {}
    shared: set[int] = set()
    for holder in holding.values():
        if isinstance(holder, types.FunctionType):
            continue  # what a closure holds is its surroundings: DSPy's deepcopy shares it, too
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
    """What a value without parts holds: id -> object, and which holds which."""

    def __init__(self, value: Any, known: Mapping[int, Any]):
        self.nodes: dict[int, Any] = {id(value): value}
        self._holders: dict[int, list[int]] = {id(value): []}
        self._held: dict[int, list[int]] = {}
        self.large = not self._walk(value, known)

    def _walk(self, value: Any, known: Mapping[int, Any]) -> bool:
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

    def open(self) -> dict[int, Any]:
        """What a copy would be made of."""
        return {key: x for key, x in self.nodes.items() if _is_open(x) or is_state(x)}

    def shared(self) -> set[int]:
        """What is passed by reference, with all that it holds."""
        return self._closure(self._shared_objects(), self._held)

    def _shared_objects(self) -> list[int]:
        """Objects that stand for something outside, or hold what does, or whose own rule of copying may be dear."""
        resources = [key for key, x in self.nodes.items() if is_live(x) and not is_plain(type(x))]
        holding = self._closure(resources, self._holders)  # at any depth: a semaphore holds a condition, that a lock
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
            return False  # an array, an index: its rule may well copy it
        try:
            copy.deepcopy(self.nodes[key])
        except Exception:
            return False
        return True

    def _closure(self, keys: Iterable[int], step: Mapping[int, list[int]]) -> set[int]:
        """The keys and what is reached from them."""
        found, front = set(), list(keys)
        while front:
            key = front.pop()
            if key not in found:
                found.add(key)
                front += step.get(key, [])
        return found


def _is_open(x: Any) -> bool:
    """Whether a copy is made of what it holds."""
    return isinstance(x, (*CONTAINERS, *METHODS)) or is_plain(type(x))
