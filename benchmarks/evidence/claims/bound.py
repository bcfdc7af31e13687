"""How much a good instruction saves: RL that is told the rule from its first step, beside RL and FST that are not.

It pays for no search and begins where a search is to end, so it says what a world leaves to be saved by text.
"""

from collections.abc import Sequence

from benchmarks.evidence.claims.efficiency import reached
from benchmarks.evidence.places import TOLD
from benchmarks.evidence.raw import Result, by_arm, curve, final, need, shown
from benchmarks.readme import table

LEVELS = (0.5, 0.8)


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    """Accuracy at both ends, and updates to two levels."""
    arms = by_arm(results, world, base)
    need(arms, "rl", "fst")
    arms = {"rl": arms["rl"], "fst": arms["fst"], "rl, told the rule": by_arm(results, TOLD[world], base)["rl"]}
    return table(
        ["arm", "accuracy at the start", "at the end", *(f"updates to {level}" for level in LEVELS)],
        [
            [
                arm,
                shown([curve(run)[0][1] for run in runs.values()]),
                shown([final(run) for run in runs.values()]),
                *(shown([reached(curve, run, level) for run in runs.values()], ".1f") for level in LEVELS),
            ]
            for arm, runs in arms.items()
        ],
    )
