"""A world: a rule that the instruction does not give away, problems to learn it from, and feedback on wrong answers.

Worlds are plug-ins: one file each under `worlds/`, holding a `WORLD`, or any importable "package.module:WORLD".
"""

import importlib
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass

from programs.lab.operations import BY_NAME, OPENERS, apply

LENGTHS = (4, 5, 6)


def draw_digits(rng: random.Random) -> str:
    """A list of four to six digits as the problem shows it, e.g. "4 7 1 9"."""
    return " ".join(str(rng.randrange(10)) for _ in range(rng.choice(LENGTHS)))


def operations(*names: str) -> Callable[[str], str]:
    """The answer function of a world made of known operations, e.g. operations("reverse")("1 2 3") == "3 2 1".

    Raises:
        ValueError: one of them is not known.
    """
    if unknown := [name for name in names if name not in BY_NAME]:
        raise ValueError(f"no such operation: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return lambda numbers: " ".join(map(str, apply(names, [int(digit) for digit in numbers.split()])))


def describe_fault(expected: str, got: str, shows_answer: bool) -> str:
    """What is wrong with an answer, in the metric's words; never why it is wrong.

    `shows_answer` says whether the expected answer and the first wrong position are shown, or only the kind of fault.
    """
    want, have = expected.split(), got.split()
    if have == want:
        return "Correct."
    if len(have) != len(want):
        kind = f"Too {'many' if len(have) > len(want) else 'few'} values"
    elif sorted(have) == sorted(want):
        kind = "All values belong here, but not in these places"
    else:
        kind = "Some values do not belong here"
    if not shows_answer:
        return f"Wrong. {kind}."
    wrong = [place for place, (w, h) in enumerate(zip(want, have, strict=False), start=1) if w != h]
    place = wrong[0] if wrong else min(len(want), len(have)) + 1
    return f"Wrong. {kind}; the first fault is at place {place}. Expected: {expected}. Got: {got[:60]}."


@dataclass(frozen=True)
class World:
    """One hidden rule over lists of digits."""

    name: str
    """Short name, that of its file, e.g. "reverse_drop"."""
    answer: Callable[[str], str]
    """Problem -> answer, e.g. "4 7 1 9" -> "9 1 7"."""
    told: str
    """An instruction that states the rule. For tests and measurements only: no optimizer may read it."""
    seed_instruction: str = OPENERS[0]
    """What the program starts with: generic, without the rule."""
    draw: Callable[[random.Random], str] = draw_digits
    """Draws one problem."""
    feedback: Callable[[str, str, bool], str] = describe_fault
    """(expected, got, shows_answer) -> what the metric says."""


def world_names() -> list[str]:
    """Short names of the worlds that ship with the lab."""
    from programs.lab import worlds

    return sorted(module.name for module in pkgutil.iter_modules(worlds.__path__))


def load_world(name: str) -> World:
    """Find a world by short name ("reverse_drop") or by import path ("my_pkg.my_world:WORLD")."""
    if ":" in name:
        path, attribute = name.split(":", 1)
    elif name in world_names():
        path, attribute = f"programs.lab.worlds.{name}", "WORLD"
    else:
        raise ValueError(
            f"world={name!r}: no such world; take one of {', '.join(world_names())} or an import path such as "
            "'my_pkg.my_world:WORLD'"
        )
    world = getattr(importlib.import_module(path), attribute)
    if not isinstance(world, World):
        raise TypeError(f"world={name!r}: expected a programs.lab.world.World, found {type(world).__name__}")
    return world
