"""How sure a difference of two scores on the same problems is.

Both scores are means over n problems. The problems' own differences d_i = after_i - before_i have mean d and standard
deviation s (with n - 1). The 95 % interval is

    d ± t(0.975, n - 1) * s / sqrt(n),

with Student's t (Student 1908, "The Probable Error of a Mean"); that evaluations of language models are to be compared
in pairs by problem is argued in Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640). It is wider than a
bootstrap's on few problems, which is when a false alarm is likely. It says how much the difference depends on which
problems were drawn, and nothing of another training run.

Where every problem differs by the same (all right before, all wrong now), s is 0, and an interval of no width would
call two problems certain: then there is none. What is left is the sign test (Arbuthnott 1710): if a problem were as
likely to rise as to fall, n of n fall or rise with probability 2 * 0.5^n, which from 6 problems on is below 5 %.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COVERAGE = 0.95
INTERVAL = f"{COVERAGE:.0%} paired t interval over problems"
SAME = 1e-9
"""Differences closer than this are the same: 0.3 - 0.6 and 0.2 - 0.5 differ in their last bits only."""


@dataclass(frozen=True)
class Difference:
    """A mean difference, e.g. ``Difference(0.16, 0.05, 0.27, 64)``."""

    mean: float
    low: float | None
    """Of the interval; None where there is none: for a single problem, and where all differ by the same."""
    high: float | None
    problems: int
    """Problems that both sides measured."""

    @property
    def falls(self) -> bool:
        """Whether it is a decline beyond what the choice of problems explains."""
        if self.high is None:  # all fall alike: the sign test
            return self.mean < 0 and 2 * 0.5**self.problems < 1 - COVERAGE
        return self.high < 0

    @property
    def turned(self) -> "Difference":
        """The same from the other side: what was lost."""
        low, high = (None if of is None else -of for of in (self.high, self.low))
        return Difference(-self.mean, low, high, self.problems)

    @property
    def words(self) -> str:
        """How sure it is, e.g. ``"95% interval 0.050 to 0.270, 64 problems"``.

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
    from scipy.stats import t  # takes most of a second, and only runs that validate need it

    half = float(t.ppf((1 + COVERAGE) / 2, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean, mean - half, mean + half, len(gaps))
