"""Claim (a): Fast-Slow Training reaches RL's running peak in fewer updates, and in fewer rollouts of all kinds."""

from collections.abc import Sequence

from benchmarks.evidence.arms import ABOUT
from benchmarks.evidence.raw import Result, by_arm, curve, final, first_at, ratios, shown, spent
from benchmarks.readme import table


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    return table(
        ["arm", "accuracy at the end", "RL's steps over its", "RL's rollouts over its"],
        [
            [
                f"{arm}: {ABOUT[arm]}",
                shown([final(run) for run in runs.values()]),
                shown(ratios(arms, arm, lambda run, level: first_at(curve(run), level)), ".1f", never=0.0),
                shown(ratios(arms, arm, lambda run, level: first_at(spent(run), level)), ".1f", never=0.0),
            ]
            for arm, runs in arms.items()
        ],
    )
