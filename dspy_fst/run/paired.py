"""The confidence interval of a difference of two scores on the same problems.

Both scores are means over n problems. The problems' own differences d_i = after_i - before_i have mean d and standard
deviation s (with n - 1). The 95 % interval is

    d ± t(0.975, n - 1) * s / sqrt(n),

with Student's t (Student 1908, "The Probable Error of a Mean"). Miller 2024, "Adding Error Bars to Evals" (arXiv
2411.00640), argues for pairing by problem. On few problems, where a false alarm is likely, the interval is wider than a
bootstrap's. It says how much the difference depends on which problems were drawn, and nothing about another training
run.

If every problem differs by the same amount (all right before, all wrong now), s is 0. An interval of width zero would
call two problems certain, so there is no interval then, and the sign test (Arbuthnott 1710) decides: if a problem were
as likely to rise as to fall, n of n would fall or rise with probability 2 * 0.5^n, which is below 5 % from 6 problems.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COVERAGE = 0.95
INTERVAL = f"{COVERAGE:.0%} paired t interval over problems"
SAME = 1e-9
"""Differences closer than this count as equal: 0.3 - 0.6 and 0.2 - 0.5 differ in their last bits."""


@dataclass(frozen=True)
class Difference:
    """A mean difference, e.g. ``Difference(0.16, 0.05, 0.27, 64)``."""

    mean: float
    low: float | None
    """Lower end of the interval; None for a single problem, or when all differ by the same amount."""
    high: float | None
    problems: int
    """How many problems both sides measured."""

    @property
    def falls(self) -> bool:
        """Whether the score declines by more than the choice of problems explains."""
        if self.high is None:  # all fall alike: the sign test
            return self.mean < 0 and 2 * 0.5**self.problems < 1 - COVERAGE
        return self.high < 0

    @property
    def turned(self) -> "Difference":
        """The negated difference: what was lost."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Difference(-self.mean, low, high, self.problems)

    @property
    def words(self) -> str:
        """The interval in words, e.g. ``"95% interval 0.050 to 0.270, 64 problems"``.

        >>> Difference(-1.0, None, None, 2).words
        'the same on all 2 problems, so no interval'
        """
        if self.low is None or self.high is None:
            same = "one problem" if self.problems == 1 else f"the same on all {self.problems} problems"
            return f"{same}, so no interval"
        return f"{COVERAGE:.0%} interval {self.low:.3f} to {self.high:.3f}, {self.problems} problems"


def difference(before: Sequence[float | None], after: Sequence[float | None]) -> Difference | None:
    """The mean of ``after - before`` with its interval, over the problems that both measured; None without one.

    Args:
        before: Score of each problem, None where nothing was measured.
        after: Scores of the same problems in the same order.

    >>> difference([0.5, 0.5, None], [1.0, 0.75, 0.0])
    Difference(mean=0.375, low=-1.213..., high=1.963..., problems=2)
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    gaps = [b - a for a, b in pairs]
    if not gaps:
        return None
    mean = statistics.fmean(gaps)
    if max(gaps) - min(gaps) < SAME:
        return Difference(mean, None, None, len(gaps))
    from scipy.special import stdtrit  # Student's t: all that `scipy.stats` would take seconds to import for

    half = float(stdtrit(len(gaps) - 1, (1 + COVERAGE) / 2)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean, mean - half, mean + half, len(gaps))
