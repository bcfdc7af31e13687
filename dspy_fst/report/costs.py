"""What a run spent, and the label of each cost wherever it is shown. Pure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspy_fst.formatting.numbers import counted
from dspy_fst.run.phase_reports import CycleReport, StepReport, WarmStartReport
from dspy_fst.run.validated import Validated

LABELS = {
    "rollouts": "rollouts",
    "search_rollouts": "rollouts of searches",
    "training_rollouts": "rollouts of training",
    "validation_rollouts": "rollouts of validation, outside the budget",
    "repeats": "repeated evaluations, answered without a rollout",
    "reflections": "reflections",
    "reflections_failed": "reflections that failed",
    "demo_proposals": "proposals of demos",
    "demos_cut": "demos left out, as too long",
    "accepted": "proposals accepted",
    "demos_accepted": "proposals accepted for other demos",
    "tokens": "sampled tokens",
    "search_tokens": "sampled tokens of searches",
    "training_tokens": "sampled tokens of training",
    "validation_tokens": "sampled tokens of validation, outside the budget",
    "trained_tokens": "trained tokens",
    "updates": "weight updates",
    "skipped": "updates skipped",
    "teacher_rollouts": "rollouts of a warm start's teacher, outside the budget",
    "teacher_tokens": "sampled tokens of a warm start's teacher, outside the budget",
    "warm_tokens": "trained tokens of a warm start",
    "warm_updates": "weight updates of a warm start",
}
"""Name of a count in `Costs` -> its label, in the order in which costs are listed."""
OF_DEMOS = ("demo_proposals", "demos_cut", "demos_accepted")
"""Counts that are listed only where demos evolved."""
OF_A_WARM_START = ("teacher_rollouts", "teacher_tokens", "warm_tokens", "warm_updates")
"""Counts that are listed only where a run had a warm start."""
PARTS = ("search_rollouts", "training_rollouts", "search_tokens", "training_tokens", "demos_accepted")
"""Counts that are part of another count above them in the list."""
ACTIVITIES = {"sampling": "sampling for updates", "update": "weight updates", "publish": "publishing weights"}
"""Activity of a step report's ``seconds`` -> its label."""


@dataclass(frozen=True)
class ReflectionLM:
    """What the calls of the reflection LM cost, failed reflections included. Replies from a cache cost nothing."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    without_usage: int = 0
    """Calls whose provider reported no tokens."""
    unpriced: int = 0
    """Calls whose price nobody knows."""
    dollars: float | None = None
    """Of the other calls; None without any. An unknown price is never 0."""

    @property
    def words(self) -> str:
        """E.g. ``"12 calls, 34,567 tokens read and 890 written, 0.0123 dollars"``; what is not known is said."""
        least = "at least " if self.without_usage else ""
        tokens = f"{least}{self.input_tokens:,} tokens read and {self.output_tokens:,} written"
        if self.without_usage >= self.calls:
            tokens = "tokens not reported"
        money = "price unknown"
        if self.dollars is not None:
            rest = f" (the price of {self.unpriced:,} is unknown)" if self.unpriced else ""
            money = f"{'at least ' if rest else ''}{self.dollars:.4g} dollars{rest}"
        return f"{counted(self.calls, 'call')}, {tokens}, {money}"


REFLECTION_LM = "the reflection LM"
"""Label of `ReflectionLM.words`, below those of the counts."""


@dataclass(frozen=True)
class Costs:
    """What a run spent in all, as far as its events go. Validation is counted apart."""

    search_rollouts: int
    """Scoring the carried population included."""
    repeats: int
    """Evaluations of the searches that were answered from earlier rollouts."""
    training_rollouts: int
    reflections: int
    reflections_failed: int
    demo_proposals: int
    """Draws of demos, which no reflection LM is asked for."""
    demos_cut: int
    """Demos that were left out because of ``max_demo_tokens``."""
    accepted: int
    demos_accepted: int
    """Of these, candidates whose demos are not their parent's; the others changed instructions alone."""
    search_tokens: int
    training_tokens: int
    """Sampled for the weight updates. Rollouts that a search made are in ``search_tokens`` (``reuse_rollouts``)."""
    trained_tokens: int
    """Those that the updates learnt from, in the searches' rollouts too. So with ``reuse_rollouts`` they may be more
    than ``training_tokens``."""
    validation_rollouts: int
    """Outside of the budget, as are the tokens of validation; ``rollouts`` and ``tokens`` leave both out."""
    validation_tokens: int
    updates: int
    """Updates that moved the weights."""
    skipped: int
    teacher_rollouts: int
    teacher_tokens: int
    warm_tokens: int
    """Reply tokens that a warm start learnt from; ``trained_tokens`` leaves them out, as ``updates`` leaves out its
    updates."""
    warm_updates: int
    seconds: Mapping[str, float]
    """Wall time by activity. The sum is the time from the first event to the last."""
    reflection_lm: ReflectionLM = ReflectionLM()

    @property
    def rollouts(self) -> int:
        return self.search_rollouts + self.training_rollouts

    @property
    def tokens(self) -> int:
        return self.search_tokens + self.training_tokens

    def count(self, name: str) -> int:
        """One of the counts in `LABELS`."""
        value: int = getattr(self, name)
        return value


def labels_of(*runs: Costs) -> dict[str, str]:
    """The counts that are listed for these runs, with their labels."""
    warm = any(costs.warm_updates for costs in runs)
    demos = any(costs.demo_proposals + costs.demos_cut + costs.demos_accepted for costs in runs)
    hidden = (*(() if warm else OF_A_WARM_START), *(() if demos else OF_DEMOS))
    return {name: label for name, label in LABELS.items() if name not in hidden}


def step_rollouts(counts: Mapping[str, int]) -> int:
    """Rollouts that a step paid for, by its counts: those under the program's own texts included (``held_rollouts``),
    those that its search had made left out (``reused``)."""
    return counts.get("rollouts", 0) + counts.get("held_rollouts", 0) - counts.get("reused", 0)


def costs_of(
    cycles: Sequence[CycleReport],
    steps: Sequence[StepReport],
    validations: Sequence[Validated],
    elapsed_s: float,
    warm: WarmStartReport | None = None,
    dollars: float | None = None,
) -> Costs:
    """The sums over a run's reports.

    Args:
        warm: Of the warm start, where there was one.
        elapsed_s: Seconds from the first event to the last.
        dollars: What is known to have been paid for reflections.
    """
    trained = [step.update for step in steps if step.update.tokens]
    return Costs(
        search_rollouts=sum(cycle.rollouts for cycle in cycles),
        repeats=sum(cycle.repeats for cycle in cycles),
        training_rollouts=sum(step_rollouts(step.counts) for step in steps),
        reflections=sum(cycle.reflections for cycle in cycles),
        demo_proposals=sum(cycle.counts.get("demo_proposals", 0) for cycle in cycles),
        demos_cut=sum(cycle.counts.get("demos_cut", 0) for cycle in cycles),
        reflections_failed=sum(cycle.counts.get("reflections_failed", 0) for cycle in cycles),
        accepted=sum(cycle.proposals_accepted for cycle in cycles),
        demos_accepted=sum(cycle.counts.get("demos_accepted", 0) for cycle in cycles),
        search_tokens=sum(cycle.sampled_tokens for cycle in cycles),
        training_tokens=sum(step.sampled_tokens for step in steps),
        trained_tokens=sum(update.tokens for update in trained),
        validation_rollouts=sum(state.counts.get("rollouts", 0) for state in validations),
        validation_tokens=sum(state.sampled_tokens for state in validations),
        updates=len(trained),
        skipped=sum(step.update.skipped is not None for step in steps),
        teacher_rollouts=warm.teacher_rollouts if warm else 0,
        teacher_tokens=warm.teacher_tokens if warm else 0,
        warm_tokens=warm.tokens if warm else 0,
        warm_updates=warm.updates if warm else 0,
        seconds=_seconds(cycles, steps, validations, elapsed_s, warm),
        reflection_lm=_reflection_lm(cycles, dollars),
    )


def _reflection_lm(cycles: Sequence[CycleReport], dollars: float | None) -> ReflectionLM:
    def total(name: str) -> int:
        return sum(cycle.counts.get(name, 0) for cycle in cycles)

    return ReflectionLM(
        calls=total("reflection_calls"),
        input_tokens=total("reflection_input_tokens"),
        output_tokens=total("reflection_output_tokens"),
        without_usage=total("reflection_calls_without_usage"),
        unpriced=total("reflection_calls_unpriced"),
        dollars=dollars,
    )


def _seconds(
    cycles: Sequence[CycleReport],
    steps: Sequence[StepReport],
    validations: Sequence[Validated],
    elapsed_s: float,
    warm: WarmStartReport | None,
) -> dict[str, float]:
    spent = Counter({"sampling for searches": sum(cycle.seconds or 0.0 for cycle in cycles)})
    for step in steps:
        for activity, seconds in step.seconds.items():
            spent[ACTIVITIES.get(activity, activity)] += seconds or 0.0  # type: ignore[assignment]
    if validations:
        spent["validation"] = math.fsum(state.seconds for state in validations)  # type: ignore[assignment]
    if warm:
        spent["warm start"] = warm.seconds  # type: ignore[assignment]
    rest = max(0.0, elapsed_s - math.fsum(spent.values()))
    return {**spent, "everything else (reflections, saving, pauses)": rest}
