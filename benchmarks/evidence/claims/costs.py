"""What a run of each arm spent; medians."""

import statistics
from collections.abc import Sequence

from benchmarks.evidence.raw import Result, by_arm, last
from benchmarks.readme import table

NAMES = ("training rollouts", "search rollouts", "reflections", "tokens sampled", "tokens trained", "updates")


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    return table(
        ["arm", *NAMES],
        [
            [arm, *(f"{statistics.median(last(run)[name] for run in runs.values()):,.0f}" for name in NAMES)]
            for arm, runs in arms.items()
        ],
    )
