"""Claim (e): three worlds one after the other, each compile() going on from the program that the last one returned.

The instruction that every run starts with is the same and names no task. RL carries its weights on, the others also
their population.
"""

from collections.abc import Sequence

from benchmarks.evidence.raw import Result, final, shown
from benchmarks.readme import table

SEQUENCE = ("reverse_drop", "ends_decrement", "descending")


def rows(results: Sequence[Result], world: str = "", base: str = "base") -> str:
    """Median accuracy at the end of each stage; beside it the same arm's when it starts from the base."""
    arms = dict.fromkeys(result["arm"] for result in results)
    return table(
        ["arm", *(f"{stage + 1}: {name}" for stage, name in enumerate(SEQUENCE))],
        [[arm, *(_cell(results, arm, stage, base) for stage in range(len(SEQUENCE)))] for arm in arms],
    )


def _cell(results: Sequence[Result], arm: str, stage: int, base: str) -> str:
    of = [result for result in results if result["arm"] == arm and result["world"] == SEQUENCE[stage]]
    fresh = [final(result) for result in of if result["base"] == base]
    carried = [final(result) for result in of if result["carry"]]
    return shown(fresh) if stage == 0 else f"{shown(carried)}, fresh {shown(fresh)}"
