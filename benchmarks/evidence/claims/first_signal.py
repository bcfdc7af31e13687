"""Claim (f): where the base scores almost nothing, updates and rollouts to a first signal."""

from collections.abc import Sequence

from benchmarks.evidence.raw import Result, by_arm, curve, first_at, shown, spent
from benchmarks.readme import table

SIGNAL = 0.1
"""Accuracy that counts as a first signal."""


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    return table(
        ["arm", "updates", "all rollouts"],
        [
            [
                arm,
                shown([first_at(curve(run), SIGNAL) for run in runs.values()], ".1f"),
                shown([first_at(spent(run), SIGNAL) for run in runs.values()], ",.0f"),
            ]
            for arm, runs in arms.items()
        ],
    )
