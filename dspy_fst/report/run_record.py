"""What the events of one run tell, as one frozen record: charts, pages, tables and summaries are made of it alone.

`dspy_fst.report.from_events` makes it from events, `dspy_fst.report.from_directory` from a run's directory.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.report.costs import Costs, costs_of
from dspy_fst.report.evaluated import SEEN, Conditions, Evaluated, Score, TwoByTwo
from dspy_fst.report.lineage import Node
from dspy_fst.report.predictor_totals import PredictorTotals, predictor_totals
from dspy_fst.report.samples import SampleRollout
from dspy_fst.run.ending import StopReason
from dspy_fst.run.learning import UpdateSummary, update_summary
from dspy_fst.run.phase_reports import CycleReport, StepReport, WarmStartReport
from dspy_fst.run.validated import Validated

State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True)
class RunWarning:
    """A warning that a run gave."""

    step: int | None
    """The step after which it was given; None when it came before the first step."""
    text: str


@dataclass(frozen=True)
class RunningTotal:
    """What a run had spent by the end of one step: searches, scoring and training together."""

    rollouts: int
    tokens: int
    """Sampled tokens."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that is known of one run."""

    name: str
    state: State
    started: float | None = None
    """Seconds since 1970, of the first event."""
    last: float | None = None
    """Seconds since 1970, of the last event."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The recipe, setting -> value as JSON; empty before the run has written its plan."""
    budget: Mapping[str, int] = field(default_factory=dict)
    """What the plan may spend at most, e.g. ``{"updates": 48, "training_rollouts": 12288}``."""
    warnings: tuple[RunWarning, ...] = ()
    warm_start: WarmStartReport | None = None
    cycles: tuple[CycleReport, ...] = ()
    steps: tuple[StepReport, ...] = ()
    spent: tuple[RunningTotal, ...] = ()
    """One total for each of ``steps``."""
    nodes: tuple[Node, ...] = ()
    """Every candidate, in the order of birth."""
    population: tuple[str, ...] = ()
    """Digests of the final population, or of the newest while there is no final one; best first."""
    trajectories: Mapping[int, tuple[SampleRollout, ...]] = field(default_factory=dict)
    """Step -> its samples: the best and the worst rollout of its most informative group, then others."""
    weights: str | None = None
    validations: tuple[Validated, ...] = ()
    """States that were measured on the valset, in order; empty for runs of older releases."""
    returned: Validated | None = None
    """The validated state that compile() returned; None while the run is not finished."""
    ended: StopReason | None = None
    """Why the run ended; None while it goes on, after a kill, and for a run of an older release."""
    two_by_two: TwoByTwo[Score] | None = None
    evaluations: tuple[Evaluated, ...] = ()
    reflection_dollars: float | None = None
    """What is known to have been paid for reflections; None where no price is known."""

    @cached_property
    def by_digest(self) -> Mapping[str, Node]:
        return {node.digest: node for node in self.nodes}

    @cached_property
    def ending(self) -> UpdateSummary:
        """What the updates have changed so far."""
        failures = [self.config.get(name) or 0.0 for name in ("failure_score", "format_failure_score")]
        best_score = self.config.get("perfect_score")
        return update_summary(self.steps, min(failures), 1.0 if best_score is None else best_score)

    @property
    def start_validated(self) -> Validated | None:
        """The validation of the start, if it used the terms of the newest validation; else None."""
        terms = self.validations[-1].terms if self.validations else None
        return next((state for state in self.validations if state.when == "start" and state.terms == terms), None)

    @property
    def seen(self) -> list[str]:
        """A sentence for each evaluated split whose problems the run has seen."""
        conditions: list[Conditions] = [*self.evaluations, *([self.two_by_two] if self.two_by_two else [])]
        splits = {each.split for each in conditions}
        return [f"{split}: {why}" for split, why in SEEN.items() if split in splits]

    @property
    def rewards(self) -> list[float]:
        """The mean training reward of each step that measured one."""
        return [step.reward for step in self.steps if step.reward is not None]

    @property
    def found(self) -> list[float | None]:
        """The best anchor score in the population of each search."""
        return [best(cycle.scores) for cycle in self.cycles]

    @property
    def carried(self) -> list[float | None]:
        """The best anchor score among the candidates that each search started from.

        The anchors and the weights are those of that search.
        """
        started: list[tuple[str, ...]] = [tuple(node.digest for node in self.nodes if node.born is None)]
        started += [cycle.population for cycle in self.cycles]
        return [
            best([self.by_digest[digest].scores.get(cycle.cycle) for digest in population])
            for cycle, population in zip(self.cycles, started, strict=False)
        ]

    @property
    def lost(self) -> Counter[str]:
        """Rollouts that were masked or failed, by reason, the most frequent first."""
        reports: list[CycleReport | StepReport] = [*self.cycles, *self.steps]
        counts = sum((OutcomeCounts.made_for(report.counts).labels for report in reports), Counter[str]())
        return Counter(dict(counts.most_common()))

    @cached_property
    def predictors(self) -> tuple[PredictorTotals, ...]:
        """Every predictor that was called or has a text, in the order of the program's texts."""
        return predictor_totals(self.steps, self.by_digest)

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that learnt apart; none where all calls share the weights that are trained."""
        return tuple(sorted({name for step in self.steps for name in step.update.adapters}))

    @cached_property
    def costs(self) -> Costs:
        elapsed_s = (self.last or 0.0) - (self.started or 0.0)
        return costs_of(self.cycles, self.steps, self.validations, elapsed_s, self.warm_start, self.reflection_dollars)


def best(scores: Sequence[float | None]) -> float | None:
    """The highest measured score; None when nothing was measured."""
    return max((score for score in scores if score is not None), default=None)
