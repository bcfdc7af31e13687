"""Claim (i): how much hangs on T, K, G, the number of anchors and the search's budget."""

import statistics
from collections.abc import Sequence

from benchmarks.evidence.raw import Result, all_rollouts, by_arm, curve, final, first_at, last, shown
from benchmarks.readme import table

LEVEL = 0.8


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    return table(
        ["changed", "accuracy at the end", "under the seed instruction", f"updates to {LEVEL}", "all rollouts"],
        [
            [
                arm,
                shown([final(run) for run in runs.values()]),
                shown([last(run)["seed accuracy"] for run in runs.values()]),
                shown([first_at(curve(run), LEVEL) for run in runs.values()], ".1f"),
                f"{statistics.median(all_rollouts(last(run)) for run in runs.values()):,.0f}",
            ]
            for arm, runs in arms.items()
        ],
    )
