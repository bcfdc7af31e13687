"""The input of the rules of `dspy_fst.monitoring.watch` and their findings. Pure."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspy_fst.monitoring.form_advice import Form
from dspy_fst.run.learning import span
from dspy_fst.types import StepReport, WeightsVersion

WINDOW = 5
"""Steps over which a slow problem must last, or over which a level is averaged (ours). A single batch is noise."""
SHORT = 3
"""The same for shares of a step's rollouts or tokens (ours). One batch measures those well."""


@dataclass(frozen=True)
class Finding:
    """One problem that a rule found. Findings of the same kind in consecutive steps are one episode."""

    kind: str
    """E.g. ``"entropy"``."""
    steps: Sequence[StepReport]
    """The steps that show it."""
    seen: str
    """What was measured, without a full stop."""
    advice: str
    """What to do, without a full stop."""

    def __str__(self) -> str:
        return f"{span(self.steps)}: {self.seen}. {self.advice}"


@dataclass(frozen=True)
class History:
    """The step reports so far, and what is needed to judge them."""

    reports: Sequence[StepReport]
    """The newest last."""
    worst: float
    """Reward of a failed rollout."""
    best: float
    """Reward of a perfect rollout."""
    parse_share: float
    """``FSTConfig.parse_warning_share``."""
    form: Form = field(default_factory=Form)
    """The form of the program's prompts now."""
    reply: str = ""
    """A failed reply of the newest step and why it failed; empty when no reply failed."""

    @property
    def reply_clause(self) -> str:
        """The reply as the end of a sentence; empty when there is none."""
        return f". {self.reply}" if self.reply else ""

    def updates(self, field: str) -> list[tuple[StepReport, float]]:
        """Each step that moved the weights, with one field of its UpdateReport.

        Other steps report zeros that measure nothing. A number that is not finite reads back from disk as None, so both
        are left out: a continued run must find what an uninterrupted run finds.
        """
        pairs = [(report, getattr(report.update, field)) for report in self.reports if report.update.tokens]
        return [(report, value) for report, value in pairs if value is not None and math.isfinite(value)]

    def counts(self, steps: int) -> Counter[str]:
        """Sums over the counts of the newest ``steps`` steps."""
        return sum((Counter(report.counts) for report in self.reports[-steps:]), Counter())


def best_versions(reports: Sequence[StepReport], committed: int) -> set[WeightsVersion]:
    """The weights that sampled the step with the highest mean reward: of all steps, and of the committed ones.

    A killed run goes on from its committed steps, so their best weights must be kept as well.

    Args:
        committed: Number of steps that the newest saved state holds.
    """
    versions = set()
    for candidates in (reports, [report for report in reports if report.step < committed]):
        measured = [report for report in candidates if report.reward is not None]
        if measured:
            versions.add(max(measured, key=lambda report: report.reward or 0.0).sampled_by)
    return versions


def is_stuck(report: StepReport, flat_share: float, perfect_score: float) -> bool:
    """Whether ``flat_share`` of the step's groups have zero variance while the mean reward is below half of perfect."""
    flat = report.counts.get("flat_groups", 0) / max(1, report.counts.get("groups", 0))
    solved = report.reward is not None and report.reward >= perfect_score / 2
    return flat >= flat_share and not solved
