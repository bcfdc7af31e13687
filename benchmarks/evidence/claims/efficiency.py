"""Claim (a): Fast-Slow Training reaches RL's running peak in fewer updates, and in fewer rollouts of all kinds."""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.evidence.arms import ABOUT
from benchmarks.evidence.places import BASES
from benchmarks.evidence.raw import Result, by_arm, curve, final, first_at, need_peak, ratios, shown, smooth, spent
from benchmarks.readme import table

LEVELS = {"0.9 of RL's peak": 0.9, "RL's peak": 1.0}


def reached(of: Callable[[Result], list[tuple[float, float]]], run: Result, level: float) -> float | None:
    """Where a run's smoothed curve first comes to a level; None when it never does."""
    return first_at(smooth(of(run)), level)


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    """RL's steps and rollouts over the arm's, to two levels. What an arm is is said of the laboratory's alone."""
    arms = by_arm(results, world, base)
    need_peak(arms)
    return table(
        ["arm", "accuracy at the end", *(f"{what}, to {named}" for named in LEVELS for what in ("steps", "rollouts"))],
        [
            [
                f"{arm}: {ABOUT.get(arm, '')}" if base in BASES else arm,
                shown([final(run) for run in runs.values()]),
                *(
                    shown(ratios(arms, arm, partial(reached, of), share), ".1f", never=0.0)
                    for share in LEVELS.values()
                    for of in (curve, spent)
                ),
            ]
            for arm, runs in arms.items()
        ],
    )
