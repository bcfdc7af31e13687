"""Claim (i): how much hangs on T, K, G, the number of anchors and the search's budget; and on other ways to alternate.

"Others" is the accuracy at the end on all of the laboratory's single operations when they are told.
"""

import statistics
from collections.abc import Sequence

from benchmarks.evidence.arms import ABOUT
from benchmarks.evidence.raw import Result, all_rollouts, by_arm, curve, final, first_at, last, shown, smooth
from benchmarks.readme import table

LEVEL = 0.8


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    return table(
        [
            "changed",
            "over the run",
            "at the end",
            "under the seed instruction",
            f"updates to {LEVEL}",
            "rollouts",
            "others",
        ],
        [
            [
                f"{arm}: {ABOUT.get(arm, '')}",
                shown([over_the_run(run) for run in runs.values()]),
                shown([final(run) for run in runs.values()]),
                shown([last(run)["seed accuracy"] for run in runs.values()]),
                shown([first_at(smooth(curve(run)), LEVEL) for run in runs.values()], ".1f"),
                f"{statistics.median(all_rollouts(last(run)) for run in runs.values()):,.0f}",
                shown([run["other instructions"]["trained"] for run in runs.values()]),
            ]
            for arm, runs in arms.items()
        ],
    )


def over_the_run(run: Result, under: str = "evolved") -> float:
    """Mean accuracy of the checkpoints after the start, which is also the rule that learning rates are chosen by."""
    points = curve(run, under)
    return statistics.fmean(value for _, value in points[1:] or points)
