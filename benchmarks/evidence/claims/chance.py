"""How far the error of measuring alone moves the ratio of RL's steps to FST's.

The curves that stand for the truth are each arm's mean over its seeds. Each checkpoint is drawn anew as its held-out
rollouts would come out, and the ratio is read as from a run. So the seeds differ by nothing but luck.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.claims.efficiency import LEVELS
from benchmarks.evidence.raw import Result, by_arm, curve, first_at, middle, need_peak, smooth, times_cheaper
from benchmarks.evidence.run import Run
from benchmarks.readme import table

DRAWS, ROLLOUTS = 300, Run.problems * Run.samples
Floats = NDArray[np.float64]


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    """To two levels: the ratio of the mean curves, and the range of 90 % of medians over as many seeds as there are."""
    arms = by_arm(results, world, base)
    need_peak(arms)
    runs = {arm: list(arms[arm].values()) for arm in ("rl", "fst")}
    steps = [at for at, _ in curve(runs["rl"][0])]
    means = {arm: np.mean([[value for _, value in curve(run)] for run in of], axis=0) for arm, of in runs.items()}
    draws, seeds = np.random.default_rng(0), len(runs["fst"])
    body = []
    for named, share in LEVELS.items():
        found = [
            middle(
                [ratio(steps, _drawn(means["rl"], draws), _drawn(means["fst"], draws), share) for _ in range(seeds)],
                never=0.0,
            )
            for _ in range(DRAWS)
        ]
        low, high = np.quantile(found, (0.05, 0.95))
        body.append([named, _words(ratio(steps, means["rl"], means["fst"], share)), _words(low), _words(high)])
    return table(["steps, to", "of the mean curves", f"5 % of medians of {seeds} seeds are below", "5 % above"], body)


def ratio(steps: Sequence[float], rl: Floats, fst: Floats, share: float) -> float | None:
    """RL's steps to a share of its peak over FST's; None where FST does not come to it."""
    curves = [smooth(list(zip(steps, values.tolist(), strict=True))) for values in (rl, fst)]
    level = share * max(value for _, value in curves[0])
    return times_cheaper(*(first_at(points, level) for points in curves))


def _drawn(means: Floats, draws: np.random.Generator) -> Floats:
    return draws.binomial(ROLLOUTS, means) / ROLLOUTS


def _words(value: float | None) -> str:
    return f"{value:.1f}" if value else "never"
