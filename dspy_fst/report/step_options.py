"""What a step's options did, e.g. `resample_flat` or `updates_per_batch`. Pure.

Nothing is said and drawn of those that are off.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from dspy_fst.formatting.numbers import counted, number
from dspy_fst.report.measures import Chart, Measure, Points
from dspy_fst.report.run_record import RunRecord
from dspy_fst.run.directory import Event
from dspy_fst.run.phase_reports import StepReport

DROPPED = "dropped: "
"""Begins the names of counts of rollouts that flat groups held, by reason."""
LEFT_OUT = "not reused: "
"""Begins the names of counts of a search's rollouts that a step sampled again, by reason."""


def step_words(report: Event) -> str:
    """What the options did in one step, with a comma before it, e.g. ``", 3 groups resampled"``.

    Args:
        report: Of the step, as its event has it.
    """
    counts, penalty = report["counts"], report.get("length_penalty")
    resampled, retired = counts.get("resampled_groups", 0), counts.get("retired_problems", 0)
    words = [f"{counted(counts['reused'], 'rollout')} of the search reused"] if counts.get("reused") else []
    words += [f"{counted(resampled, 'group')} resampled"] if resampled else []
    words += [f"{counted(retired, 'problem')} retired"] if retired else []
    words += [f"length penalty {number(penalty)}"] if penalty else []
    words += _optimizer_steps(report)
    return "".join(f", {each}" for each in words)


def option_lines(steps: Sequence[StepReport]) -> list[str]:
    """A sentence for each option that did something in these steps."""
    counts = sum((Counter(step.counts) for step in steps), Counter[str]())
    lines = (
        _reused(counts),
        _resampled(counts),
        _retired(steps, counts),
        _penalized(steps, counts),
        _several(steps),
        _rejected(counts),
    )
    return [line for line in lines if line]


def _optimizer_steps(report: Event) -> list[str]:
    """E.g. ``["3 optimizer steps (0.2% of tokens capped, log-ratio up to 0.031)"]``; empty for one."""
    taken, capped, ratio = (
        report["update"].get(name) for name in ("optimizer_steps", "capped_share", "later_log_ratio")
    )
    if not taken or taken == 1:
        return []
    figures = [] if capped is None else [f"{capped:.1%} of tokens capped"]
    figures += [] if ratio is None else [f"log-ratio up to {ratio:.2g}"]
    return [f"{taken} optimizer steps" + (f" ({', '.join(figures)})" if figures else "")]


def _by_reason(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}


def _reused(counts: Mapping[str, int]) -> str:
    left_out = _by_reason(counts, LEFT_OUT)
    if not counts["reused"] and not left_out:
        return ""
    why = f"; left out: {', '.join(f'{reason} {count:,}' for reason, count in left_out.items())}" if left_out else ""
    return (
        f"reuse_rollouts: {counts['reused']:,} of the {counted(counts['rollouts'], 'rollout')} of groups were those of "
        f"a search, and paid for there{why}."
    )


def _resampled(counts: Mapping[str, int]) -> str:
    if "resampled_groups" not in counts:
        return ""
    reasons = _by_reason(counts, DROPPED)
    why = f" ({', '.join(f'{reason}: {count:,}' for reason, count in sorted(reasons.items()))})" if reasons else ""
    return (
        f"resample_flat: {counted(counts['resampled_groups'], 'group')} in place of flat ones, of "
        f"{counted(counts['resampled_rollouts'], 'rollout')}. Nothing was learnt from the "
        f"{counted(sum(reasons.values()), 'rollout')} of flat groups{why}."
    )


def _retired(steps: Sequence[StepReport], counts: Mapping[str, int]) -> str:
    if "retired_problems" not in counts:
        return ""
    back = counts["taken_back_problems"]
    return (
        f"retire_solved: {counted(steps[-1].counts.get('retired_problems', 0), 'problem')} retired before step "
        f"{steps[-1].step}" + (f"; some came back {counted(back, 'time')}, because too few were left." if back else ".")
    )


def _penalized(steps: Sequence[StepReport], counts: Mapping[str, int]) -> str:
    penalties = [step.length_penalty for step in steps if step.length_penalty is not None]
    if not penalties:
        return ""
    return (
        f"overlong_penalty: {counted(counts['overlong_rollouts'], 'rollout')} had long replies; on average "
        f"{number(fmean(penalties))} was taken off the rewards, which are shown without it."
    )


def _several(steps: Sequence[StepReport]) -> str:
    several = [step.update for step in steps if step.update.optimizer_steps > 1]
    if not several:
        return ""
    capped = [update.capped_share * update.tokens for update in several if update.capped_share is not None]
    ratios = [update.later_log_ratio for update in several if update.later_log_ratio is not None]
    share = sum(capped) / sum(update.tokens for update in several)
    figures = f"; {share:.1%} of their tokens were capped" if capped else ""
    figures += f"; after the first of a batch log-ratios were up to {max(ratios):.2g}" if ratios else ""
    taken = sum(update.optimizer_steps for update in several)
    return f"updates_per_batch: {taken:,} optimizer steps in {counted(len(several), 'update')}{figures}."


def _rejected(counts: Mapping[str, int]) -> str:
    if "rejected_calls" not in counts:
        return ""
    return (
        f"loss='rft': {counted(counts['rows'], 'call')} of the best rollouts of a problem were learnt from, and "
        f"{counted(counts['rejected_calls'], 'call')} of its others were not."
    )


# ---- charts --------------------------------------------------------------------------------------


def option_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """A chart for each option that some run has on."""
    charts = [measure.chart(records) for measure in OPTIONS]
    return [chart for chart in charts if any(series.y for series in chart.series)]


def _taken(record: RunRecord) -> Points:
    """Optimizer steps of each update, where some update took several."""
    steps = record.steps if any(step.update.optimizer_steps > 1 for step in record.steps) else ()
    return [step.step for step in steps], [step.update.optimizer_steps for step in steps]


def _counted(name: str) -> Callable[[RunRecord], Points]:
    """A count of each step that has it."""

    def points(record: RunRecord) -> Points:
        steps = [step for step in record.steps if name in step.counts]
        return [step.step for step in steps], [step.counts[name] for step in steps]

    return points


OPTIONS = (
    Measure(
        "reused-rollouts",
        "Rollouts of a search in groups",
        "Sampled by the search before the step, under the same weights and texts (reuse_rollouts).",
        "update",
        "rollouts",
        {"reused": _counted("reused")},
        span=(0.0, None),
    ),
    Measure(
        "resampled-groups",
        "Groups in place of flat ones",
        "Sampled because the rollouts of other problems scored alike (resample_flat).",
        "update",
        "groups",
        {"resampled": _counted("resampled_groups")},
        span=(0.0, None),
    ),
    Measure(
        "retired-problems",
        "Retired problems",
        "Solved, and sampled no more for updates (retire_solved).",
        "update",
        "problems",
        {"retired": _counted("retired_problems")},
        span=(0.0, None),
    ),
    Measure(
        "length-penalty",
        "Penalty for long replies",
        "Mean of what was taken off a rollout's reward before advantages were computed (overlong_penalty).",
        "update",
        "reward",
        {"penalty": lambda record: ([s.step for s in record.steps], [s.length_penalty for s in record.steps])},
        span=(0.0, None),
    ),
    Measure(
        "optimizer-steps",
        "Optimizer steps of an update",
        "At most one for each problem whose group is live (updates_per_batch).",
        "update",
        "optimizer steps",
        {"steps": _taken},
        span=(0.0, None),
    ),
    Measure(
        "later-log-ratio",
        "Log-ratio after a batch's first optimizer step",
        "Largest of a token: how far the weights moved from those that sampled the batch (updates_per_batch).",
        "update",
        "nats a token",
        {"largest": lambda record: ([s.step for s in record.steps], [s.update.later_log_ratio for s in record.steps])},
        span=(0.0, None),
    ),
)
