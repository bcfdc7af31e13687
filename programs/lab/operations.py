"""What the lab's base model learns in pretraining: everyday operations on lists of digits, each in several wordings.

A *rule* maps a list of digits to a list of digits. An `Operation` is a rule with the imperatives that name it;
two of them in a row are a composition ("reverse the list, then drop the last number").
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

Rule = Callable[[list[int]], list[int]]
Chain = tuple[str, ...]
"""Names of operations in the order in which they are applied, e.g. ("reverse", "drop_last")."""


@dataclass(frozen=True)
class Operation:
    """A rule and how people say it."""

    name: str
    """Short name, e.g. "drop_last"."""
    rule: Rule
    wordings: tuple[str, ...]
    """Imperatives of the pretraining, most frequent first, e.g. "drop the last number"."""
    unheard: str
    """A wording that pretraining leaves out; its words are known, the base understands it more or less."""


def _swap_ends(xs: list[int]) -> list[int]:
    return [xs[-1], *xs[1:-1], xs[0]] if len(xs) > 1 else xs


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "copy",
        lambda xs: xs,
        ("copy the list", "repeat the numbers as they are", "leave the list unchanged"),
        "repeat the list unchanged",
    ),
    Operation(
        "reverse",
        lambda xs: xs[::-1],
        (
            "reverse the list",
            "write the numbers backwards",
            "flip the order",
            "read the list from right to left",
        ),
        "flip the list backwards",
    ),
    Operation(
        "ascending",
        sorted,
        ("sort the list", "put the numbers in ascending order", "order from smallest to largest"),
        "sort from smallest to largest",
    ),
    Operation(
        "descending",
        lambda xs: sorted(xs, reverse=True),
        ("sort downwards", "put the numbers in descending order", "order from largest to smallest"),
        "sort from largest to smallest",
    ),
    Operation(
        "drop_first",
        lambda xs: xs[1:],
        (
            "drop the first number",
            "remove the number at the start",
            "skip the first one",
            "cut off the left end",
        ),
        "cut off the number at the start",
    ),
    Operation(
        "drop_last",
        lambda xs: xs[:-1],
        (
            "drop the last number",
            "remove the number at the end",
            "skip the last one",
            "cut off the right end",
        ),
        "cut off the number at the end",
    ),
    Operation(
        "ends",
        lambda xs: [xs[0], xs[-1]],
        ("keep only the two ends", "give the first and the last number", "write just the outer numbers"),
        "keep only the first and the last number",
    ),
    Operation(
        "middle",
        lambda xs: xs[1:-1],
        ("keep only the middle", "remove both ends", "write just the inner numbers"),
        "keep only the inner numbers",
    ),
    Operation(
        "increment",
        lambda xs: [(x + 1) % 10 for x in xs],
        ("add one to each number", "raise every number by one", "replace each number by the next one"),
        "raise each number by one",
    ),
    Operation(
        "decrement",
        lambda xs: [(x - 1) % 10 for x in xs],
        (
            "subtract one from each number",
            "lower every number by one",
            "replace each number by the previous one",
        ),
        "lower each number by one",
    ),
    Operation(
        "rotate_left",
        lambda xs: xs[1:] + xs[:1],
        ("move the first number to the end", "rotate the list to the left", "shift everything left"),
        "shift the list to the left",
    ),
    Operation(
        "rotate_right",
        lambda xs: xs[-1:] + xs[:-1],
        ("move the last number to the start", "rotate the list to the right", "shift everything right"),
        "shift the list to the right",
    ),
    Operation(
        "swap_ends",
        _swap_ends,
        ("swap the first and the last number", "exchange the two ends", "trade the outer numbers"),
        "swap the two ends",
    ),
    Operation(
        "first_two",
        lambda xs: xs[:2],
        ("keep only the first two", "give the two numbers at the start"),
        "keep only the two numbers at the start",
    ),
    Operation(
        "last_two",
        lambda xs: xs[-2:],
        ("keep only the last two", "give the two numbers at the end"),
        "keep only the two numbers at the end",
    ),
    Operation(
        "double_last",
        lambda xs: xs + xs[-1:],
        ("write the last number twice", "repeat the number at the end"),
        "write the number at the end twice",
    ),
)

BY_NAME = {operation.name: operation for operation in OPERATIONS}

OPENERS = (
    "Work out the answer from the numbers.",
    "Solve the problem.",
    "Look at the list and give the right answer.",
    "Do the task with the numbers.",
    "Answer the question about the list.",
    "Find what is asked for.",
)
"""Generic instructions: they say that there is a task, not which. The first is the worlds' seed instruction."""

REMARKS = (
    "Be careful.",
    "Write only the numbers.",
    "Check the answer before you write it.",
    "Put a space between the numbers.",
    "Read the list first.",
    "Do not explain.",
)
"""Sentences that carry no rule: pretraining strews them about, so that a rule counts wherever it stands."""

_JOINS = ("{a}, then {b}.", "First {a}. Then {b}.", "{a} and then {b}.", "{a}. After that, {b}.")


def apply(names: Chain, xs: list[int]) -> list[int]:
    """Run the named operations in order, e.g. apply(("reverse", "drop_last"), [1, 2, 3]) == [3, 2]."""
    for name in names:
        xs = BY_NAME[name].rule(xs)
    return xs


def chains() -> Iterator[Chain]:
    """Every rule with a name: the single operations, then all ordered pairs of different ones (copy aside)."""
    yield from ((name,) for name in BY_NAME)
    yield from permutations((name for name in BY_NAME if name != "copy"), 2)


def say(wordings: tuple[str, ...], rng: random.Random) -> str:
    """One sentence (or two) that gives one or two wordings as an instruction, e.g. "Flip the order, then ..."."""
    text = wordings[0] + "." if len(wordings) == 1 else rng.choice(_JOINS).format(a=wordings[0], b=wordings[1])
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in text.split(". "))
