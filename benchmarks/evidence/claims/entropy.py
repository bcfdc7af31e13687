"""Claim (h): the policy keeps more entropy than under RL. In nats a token, mean of the last six updates.

Over the tokens that were trained on: those of groups that were not flat, of which an arm that does well has fewer.
"""

import statistics
from collections.abc import Sequence

from benchmarks.evidence.raw import Result, by_arm, shown
from benchmarks.readme import table


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    return table(
        ["arm", "entropy"],
        [
            [arm, shown([statistics.fmean(value for _, value in run["entropy"][-6:]) for run in runs.values()])]
            for arm, runs in arms.items()
            if all(run["entropy"] for run in runs.values())
        ],
    )
