"""Claim (f): where the base scores almost nothing, updates and rollouts to a first signal.

The first measurement is after the first search: a signal that is there by then came at some point within it.
"""

from collections.abc import Sequence

from benchmarks.evidence.raw import SIGNAL, Result, by_arm, curve, first_at, shown, spent
from benchmarks.readme import table


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    return table(
        ["arm", "updates", "all rollouts"],
        [
            [
                arm,
                shown([first_at(curve(run), SIGNAL) for run in runs.values()], ".1f"),
                _words(list(runs.values())),
            ]
            for arm, runs in arms.items()
        ],
    )


def _words(runs: Sequence[Result]) -> str:
    told = shown([first_at(spent(run), SIGNAL) for run in runs], ",.0f")
    within = any(spent(run)[0][0] > 0 and spent(run)[0][1] >= SIGNAL for run in runs)
    return f"at most {told}" if within else told
