"""How sure a difference of two scores on the same problems is.

Both scores are means over n problems. The problems' own differences d_i = after_i - before_i have mean d and standard
deviation s (with n - 1). The 95 % interval is

    d ± t(0.975, n - 1) * s / sqrt(n),

with Student's t (Student 1908, "The Probable Error of a Mean"); that evaluations of language models are to be compared
in pairs by problem is argued in Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640). It is wider than a
bootstrap's on few problems, which is when a false alarm is likely. It says how much the difference depends on which
problems were drawn, and nothing of another training run.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COVERAGE = 0.95
INTERVAL = f"{COVERAGE:.0%} paired t interval over problems"


@dataclass(frozen=True)
class Difference:
    """A mean difference, e.g. ``Difference(0.16, 0.05, 0.27, 64)``."""

    mean: float
    low: float | None
    """Of the interval; None for a single problem, which tells nothing of others."""
    high: float | None
    problems: int
    """Problems that both sides measured."""

    @property
    def falls(self) -> bool:
        """Whether it is a decline beyond what the choice of problems explains."""
        return self.high is not None and self.high < 0

    @property
    def rises(self) -> bool:
        """Whether it is a gain beyond what the choice of problems explains."""
        return self.low is not None and self.low > 0


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
    if len(gaps) == 1:
        return Difference(mean, None, None, 1)
    from scipy.stats import t  # takes most of a second, and only runs that validate need it

    half = float(t.ppf((1 + COVERAGE) / 2, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean, mean - half, mean + half, len(gaps))
