"""Claim (d): what weights that have learnt one task make of a second one, by RL from the seed instruction."""

from collections.abc import Sequence

from benchmarks.evidence.raw import Result, final, shown
from benchmarks.readme import table


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    """`world`: the second task."""
    return table(
        ["RL on the second task from", "accuracy"],
        [[arm, shown(values)] for arm, values in learnt(results, world, base).items()],
    )


def learnt(results: Sequence[Result], world: str, base: str = "base") -> dict[str, list[float]]:
    """What came to the second task, "the base" or an arm -> accuracy at its end, by seed."""
    after: dict[str, list[float]] = {}
    for result in results:
        if result["world"] == world and result["arm"] == "rl" and not result["carry"]:
            arm = "the base" if result["base"] == base else result["base"].split("-")[0]
            after.setdefault(arm, []).append(final(result))
    return after
