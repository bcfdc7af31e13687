"""Where the parts of a program stand: also in nested containers, objects and closures, where DSPy does not look."""

import types
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import dspy

from dspy_fst.rollout.anatomy import copies_itself, globals_read, holds, is_part, is_plain, may_hold
from dspy_fst.rollout.making import can_be_made


class Tree:
    """Everything in a program that may lead to a part of it.

    ``nodes``: id -> object, the program first; ``holding``: those that are parts or hold one.

    Args:
        program: Where the walk begins.
        known: id -> object, for what is known to hold no part: it is not walked into.
    """

    def __init__(self, program: Any, known: Mapping[int, Any] = MappingProxyType({})):
        self._known = known
        self.nodes: dict[int, Any] = {id(program): program}
        self._holders: dict[int, list[int]] = {id(program): []}
        self._named: dict[int, tuple[int, str]] = {}
        self._walk(program)
        self.holding = self._reaching([key for key, node in self.nodes.items() if is_part(node)])

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

    def faults(self) -> list[str]:
        """Why copies would share a part with the program; empty when they would not."""
        all_stuck = {key: node for key, node in self.holding.items() if not can_be_made(node)}
        stuck = {key: node for key, node in all_stuck.items() if not self._within(key, all_stuck)}
        faults = [
            f"student: {self.place(key)} is a {type(node).__name__} that holds {self._part_in(key)}, and it cannot be "
            "copied: rollouts under other texts would share that module. Make it inside forward(), or hold the module "
            "beside it, as an attribute, or in a list or dict"
            for key, node in stuck.items()
        ]
        for key, node in self.nodes.items():
            if isinstance(node, types.FunctionType):
                faults += [
                    f"student: the function at {self.place(key)} reads the global variable {name!r}, which is a module "
                    "of this program, so its copies would all speak with that one. Pass the module to the function, "
                    "or make it a method"
                    for name, value in dict(globals_read(node)).items()
                    if is_part(value) and id(value) in self.holding
                ]
        return faults

    def copying_themselves(self, key: int) -> dict[str, str]:
        """Place -> class, of what holds a node and is neither a part nor copied but by its class's own rule."""
        return {
            self.place(above): type(node).__name__
            for above, node in self._reaching([key]).items()
            if is_plain(type(node)) and not is_part(node) and copies_itself(type(node))
        }

    def _within(self, key: int, others: Mapping[int, Any]) -> bool:
        """Whether it stands inside of one of the others: a generator's cells are told with the generator."""
        while key in self._named:
            key, _ = self._named[key]
            if key in others:
                return True
        return False

    def _part_in(self, key: int) -> str:
        below = next(k for k, node in self.nodes.items() if is_part(node) and key in self._reaching([k]))
        return self.place(below) or "the program itself"

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

    def _reaching(self, keys: list[int]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        while keys:
            key = keys.pop()
            if key in self.nodes and key not in found:
                found[key] = self.nodes[key]
                keys += self._holders[key]
        return found


def all_predictors(program: dspy.Module, kinds: Any = dspy.Predict) -> list[Any]:
    """Every predictor of the program, or every part of the given classes, wherever it stands."""
    return [part for part in Tree(program).parts().values() if isinstance(part, kinds)]


def hidden_predictors(program: dspy.Module) -> dict[str, dspy.Predict]:
    """Place -> predictor that DSPy's ``named_parameters`` misses, e.g. in a dict of lists; frozen ones left out."""
    seen = {id(parameter) for _, parameter in program.named_parameters()}
    seen |= {id(inner) for _, inner in frozen_predictors(program)}
    parts = Tree(program).parts().items()
    return {place: part for place, part in parts if isinstance(part, dspy.Predict) and id(part) not in seen}


def frozen_predictors(program: dspy.Module) -> Iterator[tuple[str, dspy.Predict]]:
    """(place of a part that is marked ``_compiled``, predictor in it): DSPy leaves them out of ``named_parameters``."""
    for place, part in Tree(program).parts().items():
        if part is not program and getattr(part, "_compiled", False):
            yield from ((place, inner) for inner in all_predictors(part))
