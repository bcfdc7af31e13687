"""What of a run is still due: which cycles, searches, steps and states. Decided from the plan, the committed state and
the step reports, so a run that goes on decides as an uninterrupted one does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dspy_fst.config import FSTConfig
from dspy_fst.monitoring.history import is_stuck
from dspy_fst.run.ending import StopReason, complete
from dspy_fst.training.plan import Cycle, Plan
from dspy_fst.types import StepReport


class Schedule:
    """The order of a run's cycles and steps, and its end.

    Args:
        plan: All that the run will do.
        config: The recipe.
        state: The newest committed state; empty before the first.
        reports: Of the steps so far; grows while the run goes on.
    """

    def __init__(
        self, plan: Plan, config: FSTConfig, state: Callable[[], Mapping[str, Any]], reports: Sequence[StepReport]
    ):
        self._plan, self._config, self._state, self._reports = plan, config, state, reports
        self.stopped: StopReason | None = None
        """Why no further step is made before the plan is done; None as long as the run goes on."""

    def cycles(self) -> Iterator[Cycle]:
        """Cycles that are not finished; none once the run was stopped."""
        first = self._state().get("cycle", 0)
        return (cycle for cycle in self._plan.cycles if cycle.index >= first and self.stopped is None)

    def must_search(self, cycle: Cycle) -> bool:
        """Whether this cycle has a fast phase that was not committed yet."""
        due = bool(cycle.search_budget) and self._state().get("searched", -1) < cycle.index
        if not due or cycle.index == 0 or self._config.search_when_flat is None:
            return due
        before = next(report for report in self._reports if report.step == cycle.steps.start - 1)
        return is_stuck(before, self._config.search_when_flat, self._config.perfect_score)

    def steps(self, cycle: Cycle) -> Iterator[int]:
        """Steps of the cycle that were not committed yet; none once the run was stopped."""
        first = max(cycle.steps.start, self._state().get("step", 0))
        return (step for step in range(first, cycle.steps.stop) if self.stopped is None)

    def stop(self, reason: StopReason) -> None:
        """Make no further step: the current step is committed, and the alternation is over."""
        self.stopped = self.stopped or reason

    def stop_early(self, reason: StopReason | None) -> None:
        """Stop for this reason, unless the plan is done or its only search is still to come."""
        if reason and len(self._reports) < self._plan.updates and not self._plan.searches_late:
            self.stop(reason)

    def state_is_due(self, step: int, cycle: Cycle) -> bool:
        """Whether a state is committed after this step: every ``checkpoint_every`` steps, where the run ends or was
        stopped, and before a search, whose journal goes on from a state."""
        later = [other for other in self._plan.cycles if other.index > cycle.index]
        ends = step + 1 == cycle.steps.stop
        return (
            self.stopped is not None
            or (step + 1) % self._config.checkpoint_every == 0
            or (ends and not any(other.steps for other in later))
            or (ends and bool(later) and self.must_search(later[0]))
        )

    @property
    def end(self) -> StopReason:
        """Why the alternation is over."""
        return self.stopped or complete(len(self._reports))
