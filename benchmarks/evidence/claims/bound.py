"""How much a good instruction saves: RL that is told the rule from its first step, beside RL and FST that are not.

It pays for no search and begins where a search is to end, so it says what a world leaves to be saved by text.
"""

from collections.abc import Sequence
from functools import partial

from benchmarks.evidence.claims.efficiency import LEVELS, reached
from benchmarks.evidence.raw import Result, by_arm, curve, final, need, ratios, shown
from benchmarks.readme import table

TOLD = {
    "reverse_drop": "benchmarks.evidence.worlds:TOLD_REVERSE_DROP",
    "ends_decrement": "benchmarks.evidence.worlds:TOLD_ENDS_DECREMENT",
}
"""World -> the same one, with the rule in its seed instruction."""


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    """RL's steps over the arm's, to two levels."""
    arms = by_arm(results, world, base)
    need(arms, "rl", "fst")
    arms = {"rl": arms["rl"], "fst": arms["fst"], "rl, told the rule": by_arm(results, TOLD[world], base)["rl"]}
    return table(
        ["arm", "accuracy at the start", "at the end", *(f"steps, to {named}" for named in LEVELS)],
        [
            [
                arm,
                shown([curve(run)[0][1] for run in runs.values()]),
                shown([final(run) for run in runs.values()]),
                *(
                    shown(ratios(arms, arm, partial(reached, curve), share), ".1f", never=0.0)
                    for share in LEVELS.values()
                ),
            ]
            for arm, runs in arms.items()
        ],
    )
