"""Claim (b): a higher ceiling. A sigmoid in updates is fitted to an arm's curves of all seeds together.

R(C) = R0 + (A - R0) / (1 + (Cmid / C)^B) after ScaleRL (2510.13786), with the A in [0, 1] that is read as the ceiling.
The interval is that of fits to the seeds drawn with replacement. Where a curve still rises at its end the fit comes to
its bound, 1, and has found no ceiling.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from benchmarks.evidence.raw import Result, by_arm, curve, final, shown
from benchmarks.readme import table

RESAMPLES, COVERAGE = 200, 0.9
AT_THE_BOUND = 0.995
"""A fit above it came to the largest value that it may take."""
Floats = NDArray[np.float64]


def sigmoid(updates: Floats, start: float, ceiling: float, middle: float, steepness: float) -> Floats:
    """Reward after some updates (above 0)."""
    fitted: Floats = start + (ceiling - start) / (1 + (middle / updates) ** steepness)
    return fitted


def fitted_ceiling(runs: Sequence[Result]) -> float:
    """A of the least-squares fit to the curves of all runs together; the start is their mean at no update."""
    return _ceiling_of(tuple(sorted(tuple(curve(run)) for run in runs)))


@cache  # of few seeds there are few samples with replacement, and two claims ask for the same ones
def _ceiling_of(curves: tuple[tuple[tuple[float, float], ...], ...]) -> float:
    points = np.array([point for its in curves for point in its], dtype=np.float64)
    start = float(points[points[:, 0] == 0, 1].mean())
    later = points[points[:, 0] > 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a covariance that cannot be estimated is not used
        (ceiling, _, _), _ = curve_fit(
            lambda updates, a, c, b: sigmoid(updates, start, a, c, b),
            later[:, 0],
            later[:, 1],
            p0=(max(float(later[:, 1].max()), 1e-3), 8.0, 2.0),
            bounds=((0.0, 0.5, 0.3), (1.0, 200.0, 20.0)),
            max_nfev=20_000,
        )
    return float(ceiling)


def interval(runs: Sequence[Result]) -> tuple[float, float]:
    """Of the fitted ceiling, over seeds drawn with replacement."""
    draw = np.random.default_rng(0)
    ceilings = [fitted_ceiling([runs[i] for i in draw.integers(len(runs), size=len(runs))]) for _ in range(RESAMPLES)]
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(ceilings, [tail, 1 - tail])
    return float(low), float(high)


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    body = []
    for arm, runs in arms.items():
        if arm in ("gepa", "gepa_long", "rl_then_gepa"):  # no curve in updates, or one that ends with a jump
            body.append([arm, "", shown([final(run) for run in runs.values()])])
            continue
        low, high = interval(list(runs.values()))
        fitted = f"{fitted_ceiling(list(runs.values())):.2f} ({low:.2f} to {high:.2f})"
        body.append([arm, fitted, shown([final(run) for run in runs.values()])])
    return table(["arm", "fitted ceiling", "accuracy at the end"], body)
