"""What the options of a step did: `resample_flat`. Empty wherever an option is off. Pure."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from dspy_fst.formatting.numbers import counted
from dspy_fst.report.measures import Chart, Measure, Points
from dspy_fst.report.run_record import RunRecord
from dspy_fst.types import StepReport

DROPPED = "dropped: "
"""Begins the names of counts of rollouts that flat groups held, by reason."""


def step_words(counts: Mapping[str, int]) -> str:
    """What the options did in one step, with a comma before it, e.g. ``", 3 groups resampled"``.

    Args:
        counts: Of the step's report.
    """
    resampled = counts.get("resampled_groups", 0)
    return f", {counted(resampled, 'group')} resampled" if resampled else ""


def option_lines(steps: Sequence[StepReport]) -> list[str]:
    """A sentence for each option that did something in these steps."""
    counts = sum((Counter(step.counts) for step in steps), Counter[str]())
    return [line for line in (_resampled(counts),) if line]


def _resampled(counts: Mapping[str, int]) -> str:
    if "resampled_groups" not in counts:
        return ""
    reasons = {name.removeprefix(DROPPED): count for name, count in counts.items() if name.startswith(DROPPED)}
    why = f" ({', '.join(f'{reason}: {count:,}' for reason, count in sorted(reasons.items()))})" if reasons else ""
    return (
        f"resample_flat: {counted(counts['resampled_groups'], 'group')} in place of flat ones, of "
        f"{counted(counts['resampled_rollouts'], 'rollout')}. Nothing was learnt from the "
        f"{counted(sum(reasons.values()), 'rollout')} of flat groups{why}."
    )


# ---- charts --------------------------------------------------------------------------------------


def option_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """A chart for each option that some run has on."""
    charts = [measure.chart(records) for measure in OPTIONS]
    return [chart for chart in charts if any(series.y for series in chart.series)]


def _counted(name: str) -> Callable[[RunRecord], Points]:
    """A count of each step that has it."""

    def points(record: RunRecord) -> Points:
        steps = [step for step in record.steps if name in step.counts]
        return [step.step for step in steps], [step.counts[name] for step in steps]

    return points


OPTIONS = (
    Measure(
        "resampled-groups",
        "Groups in place of flat ones",
        "Sampled because the rollouts of other problems scored alike (resample_flat).",
        "update",
        "groups",
        {"resampled": _counted("resampled_groups")},
        span=(0.0, None),
    ),
)
