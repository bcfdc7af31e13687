"""Worlds beside the lab's own: a ceiling below 1, problems that need different advice, rules that are told.

They are named by import path, as anybody's own world is: ``benchmarks.evidence.worlds:CEILING``.
"""

import zlib
from dataclasses import replace

from programs.lab.world import World, load_world, operations

TOLD = "Reverse the list, then drop the last number."
_main, _other = operations("reverse", "drop_last"), operations("reverse")


def _with_exceptions(numbers: str) -> str:
    """The main world's rule, but for one problem in five, which nothing in the problem tells apart."""
    return _other(numbers) if zlib.crc32(numbers.encode()) % 5 == 0 else _main(numbers)


def _by_length(numbers: str) -> str:
    """Lists of five are reversed; of the others the last number is dropped too."""
    return _other(numbers) if len(numbers.split()) == 5 else _main(numbers)


CEILING = World(name="ceiling", answer=_with_exceptions, told=TOLD)
"""Nobody who does not learn the problems by heart gets more than 0.8 of them right."""

BY_LENGTH = World(name="by_length", answer=_by_length, told=TOLD)
"""One instruction advises well on two thirds of the problems at most, and the base cannot follow a condition: a
population may hold both advices, and the weights have to learn which one holds where."""

TOLD_REVERSE_DROP = replace(
    load_world("reverse_drop"), seed_instruction="Drop the first number, then reverse the list."
)
"""The lab's own with the rule in its seed instruction, in the wording that the base is known to follow best."""

TOLD_ENDS_DECREMENT = replace(load_world("ends_decrement"), seed_instruction=load_world("ends_decrement").told)
