"""What the rules of `dspy_fst.monitoring.watch` look at, and what they find."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspy_fst.monitoring.form_advice import Form
from dspy_fst.run.learning import span
from dspy_fst.types import StepReport, WeightsVersion

WINDOW = 5
"""Steps over which a slow trouble must hold, or a level is averaged (ours): one batch is noise."""
SHORT = 3
"""The same for shares of a step's rollouts or tokens, which one batch measures well (ours)."""


@dataclass(frozen=True)
class Finding:
    """One trouble. Findings of one kind in a row are one episode."""

    kind: str
    steps: Sequence[StepReport]
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"{span(self.steps)}: {self.seen}. {self.advice}"


@dataclass(frozen=True)
class History:
    """The reports so far, the newest last, and the range of the reward."""

    reports: Sequence[StepReport]
    worst: float
    best: float
    parse_share: float
    """``FSTConfig.parse_warning_share``."""
    form: Form = field(default_factory=Form)
    """How the program asks now."""
    reply: str = ""
    """A failed reply of the newest step, and why it failed; empty where none did."""

    @property
    def one_reply(self) -> str:
        """The reply as the end of a sentence; empty where there is none."""
        return f". {self.reply}" if self.reply else ""

    def updates(self, field: str) -> list[tuple[StepReport, float]]:
        """Steps that moved the weights, and what their updates measured of one field of UpdateReport.

        The others report zeros that measure nothing. A number that is not finite reads back from the disk as None;
        both are left out, so that a continued run finds what an uninterrupted one does.
        """
        pairs = [(report, getattr(report.update, field)) for report in self.reports if report.update.tokens]
        return [(report, value) for report, value in pairs if value is not None and math.isfinite(value)]

    def counts(self, steps: int) -> Counter[str]:
        """Sums of the newest steps' counts."""
        return sum((Counter(report.counts) for report in self.reports[-steps:]), Counter())


def best_versions(reports: Sequence[StepReport], committed: int) -> set[WeightsVersion]:
    """Weights that sampled the step with the highest mean reward, of all and of the first ``committed`` steps.

    A killed run goes on from the committed steps, whose best would otherwise be gone.
    """
    found = set()
    for some in (reports, [report for report in reports if report.step < committed]):
        measured = [report for report in some if report.reward is not None]
        if measured:
            found.add(max(measured, key=lambda report: report.reward or 0.0).sampled_by)
    return found


def is_stuck(report: StepReport, flat_share: float, perfect_score: float) -> bool:
    """Whether at least so large a share of the step's groups taught nothing, and not from being solved."""
    flat = report.counts.get("flat_groups", 0) / max(1, report.counts.get("groups", 0))
    solved = report.reward is not None and report.reward >= perfect_score / 2
    return flat >= flat_share and not solved
