"""Whether a run's updates changed the weights, and why not. Pure functions of the step reports.

A step *moved* the weights when its update had a finite gradient (see `UpdateReport.moved`). The newest steps in a row
that moved nothing are a *standstill*. Its cause is read from the counts of these steps, so a continued run finds the
same cause as an uninterrupted one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import Literal

from dspy_fst.outcomes.outcome import PARSE, OutcomeCounts
from dspy_fst.run.phase_reports import StepReport

Cause = Literal["solved", "unparsed", "failed", "floor", "alike", "unmeasured", "untrained", "not finite"]
NOTHING_CHANGED = "no update changed the weights"
MOST, NEARLY_ALL = 0.5, 0.9
"""Shares of a standstill's rollouts from which on a cause is reported, and reported of nearly all of them (ours)."""
AT_THE_TOP, AT_THE_FLOOR = 0.05, 0.25
"""A standstill is flat at the top, or at the floor, when its mean reward is so near to the best, or the worst, reward.
Both are shares of the range between the two (ours). The top is strict: a run that reaches it ends well."""


@dataclass(frozen=True)
class Standstill:
    """The newest steps, none of which moved the weights."""

    steps: Sequence[StepReport]
    cause: Cause
    seen: str
    """The cause in words, e.g. ``"nothing parsed: 100% of the rollouts ended in a reply that does not parse"``."""

    @property
    def words(self) -> str:
        """E.g. ``"steps 0 to 11: 12 steps in a row had no gradient: ..."``."""
        count = len(self.steps)
        return (
            f"{span(self.steps)}: {f'{count} steps in a row' if count > 1 else '1 step'} had no gradient: {self.seen}"
        )


@dataclass(frozen=True)
class UpdateSummary:
    """What a run's updates did to the weights, so far or in all."""

    steps: int
    moved: int
    """Steps that moved the weights."""
    cause: Cause | None
    """Why the newest steps moved nothing; None when the newest step moved the weights, or there is no step."""
    seen: str

    @property
    def nothing_learned(self) -> bool:
        """Whether there were steps, and none of them moved the weights."""
        return bool(self.steps) and not self.moved

    @property
    def words(self) -> str:
        """One sentence without a full stop. It always says so when updates were made and none changed the weights."""
        if not self.steps:
            return "no update of the weights was made"
        if not self.moved:
            return f"{NOTHING_CHANGED}: {self.seen}"
        done = f"{self.moved} of {self.steps} updates changed the weights"
        return f"{done}; the last ones did not: {self.seen}" if self.cause else done


def moved(report: StepReport) -> bool:
    """Whether the step's update changed the weights. Reports of older releases, which hold less, are read as well."""
    return bool(report.update.rows or report.update.tokens) and report.update.skipped is None


def standstill(reports: Sequence[StepReport], worst: float = 0.0, best: float = 1.0) -> Standstill | None:
    """The newest steps that moved nothing; None when the newest one moved the weights.

    Args:
        reports: All steps so far, the newest last.
        worst: Reward of a failed rollout.
        best: Reward of a perfect one.
    """
    steps = list(takewhile(lambda report: not moved(report), reversed(reports)))[::-1]
    if not steps:
        return None
    cause, seen = _cause(steps, worst, best)
    return Standstill(steps, cause, seen)


def update_summary(reports: Sequence[StepReport], worst: float = 0.0, best: float = 1.0) -> UpdateSummary:
    """What the updates did to the weights; the arguments are those of `standstill`."""
    still = standstill(reports, worst, best)
    done = sum(map(moved, reports))
    return UpdateSummary(len(reports), done, still.cause if still else None, still.seen if still else "")


def _cause(steps: Sequence[StepReport], worst: float, best: float) -> tuple[Cause, str]:
    counts = sum((Counter(report.counts) for report in steps), Counter[str]())
    outcomes = OutcomeCounts.of(counts)
    masks, failures = outcomes.masked, outcomes.failed
    rollouts, measured = counts["rollouts"], counts["rollouts"] - masks.total()
    rewards = [report.reward for report in steps if report.reward is not None]
    if sum(report.update.skipped is not None for report in steps) > MOST * len(steps):
        return "not finite", f"the updates were skipped, as they were not finite ({steps[-1].update.skipped})"
    if rollouts and (not rewards or masks.total() >= MOST * rollouts):
        return (
            "unmeasured",
            f"nothing was measured: {masks.total() / rollouts:.0%} of the rollouts were masked ({_listed(masks)})",
        )
    if not rewards:
        return "untrained", "no call was found that can be learnt from"
    reward, reach = fmean(rewards), best - worst
    if reward >= best - AT_THE_TOP * reach:
        return "solved", f"flat at the top: mean reward {reward:.3g}, so these problems leave nothing to learn"
    if (unparsed := failures[PARSE] / measured) >= MOST:
        how_many = "nothing" if unparsed == 1 else "hardly anything"
        return "unparsed", f"{how_many} parsed: {unparsed:.0%} of the rollouts ended in a reply that does not parse"
    if (failed := failures.total() / measured) >= NEARLY_ALL:
        return "failed", f"{failed:.0%} of the rollouts failed ({_listed(failures)})"
    if counts["live_groups"] or counts["no_trained_calls"] >= MOST * measured:
        return "untrained", f"no call could be trained{_greedy(counts)}"
    flat = "the rollouts of each problem scored alike"
    if reward <= worst + AT_THE_FLOOR * reach:
        return "floor", f"flat at the floor: mean reward {reward:.3g}, and {flat}"
    return "alike", f"flat at mean reward {reward:.3g}: {flat}"


def _greedy(counts: Counter[str]) -> str:
    greedy = counts["greedy_calls"]
    return f": {greedy} calls were greedy (temperature 0) and have no gradient" if greedy else ""


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())


def span(steps: Sequence[StepReport]) -> str:
    """E.g. ``"steps 3 to 7"``, or ``"step 3"`` for one."""
    first, last = steps[0].step, steps[-1].step
    return f"step {first}" if first == last else f"steps {first} to {last}"
