"""Progress of a run against its plan, and the time that is left."""

from collections import Counter
from collections.abc import Callable, Mapping

from dspy_fst.formatting.numbers import counted, duration
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.report.costs import step_rollouts
from dspy_fst.run.directory import Event


class Standing:
    """Progress against the plan.

    A rollout counts as soon as it is made. It counts for its search or step once that is over.
    """

    def __init__(self) -> None:
        self.budget: Mapping[str, int] = {}
        self.done: Counter[str] = Counter()
        """Finished ``searches`` and ``updates``, and rollouts of ``search``, ``train`` and ``validation``."""
        self.masked = self.played = self.played_masked = 0

    def add(self, event: Event) -> None:
        """Take in a finished search or step."""
        report, step = event["report"], event["event"] == "step"
        rollouts = step_rollouts(report["counts"]) if step else report["rollouts"]
        self.done.update({"updates" if step else "searches": 1, "train" if step else "search": rollouts})
        self.masked += OutcomeCounts.of(report["counts"]).masked.total()
        self.played = self.played_masked = 0

    @property
    def planned(self) -> int:
        """At most so many rollouts of searches and updates. Validation is not included."""
        names = ("search_rollouts", "scoring_rollouts", "training_rollouts")
        return sum(self.budget.get(name, 0) for name in names)

    @property
    def over(self) -> bool:
        """Whether all searches and updates are done."""
        return bool(self.budget) and all(
            self.done[name] >= self.budget.get(name, 0) for name in ("searches", "updates")
        )

    @property
    def spent(self) -> int:
        return self.done["search"] + self.done["train"] + (0 if self.over else self.played)

    def left(self) -> dict[str, float]:
        """Planned rollouts that are not made yet, by purpose."""
        searches, planned = self.budget.get("searches", 0), self.planned - self.budget.get("training_rollouts", 0)
        return {
            "search": planned * max(0, searches - self.done["searches"]) / searches if searches else 0.0,
            "train": self._left_of_training(),
            "validation": max(0, self.budget.get("validation_rollouts", 0) - self.done["validation"]),
        }

    def _left_of_training(self) -> float:
        """At most what is planned; at the mean of the steps so far, which need not replace every flat group."""
        planned, done = self.budget.get("training_rollouts", 0) - self.done["train"], self.done["updates"]
        updates = self.budget.get("updates", 0) - done
        return max(0.0, min(planned, updates * self.done["train"] / done) if done else planned)

    @property
    def progress(self) -> str:
        return ", ".join(
            f"{self.done[name]} of {counted(self.budget[name], noun)}"
            for name, noun in (("searches", "search"), ("updates", "update"))
            if self.budget.get(name)
        )

    @property
    def rollouts(self) -> str:
        planned = f" of {self.planned:,}" if self.planned else ""
        rollouts = self.done["search"] + self.done["train"] + self.played
        masked = self.masked + self.played_masked
        return f"{self.spent:,}{planned}" + (f", {masked / rollouts:.1%} masked" if masked else "")


class Times:
    """The time of each phase in this process, and the time that is left at this rate."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._activity, self._entered = "starting", clock()
        self._spent: Counter[str] = Counter()
        self._since: float | None = None
        """When the current search or step began; None before the first."""
        self._seconds: Counter[str] = Counter()
        self._rollouts: Counter[str] = Counter()

    def enter(self, activity: str) -> None:
        now = self._clock()
        self._spent[self._activity] += now - self._entered  # type: ignore[assignment]
        self._activity, self._entered = activity, now
        if self._since is None:
            self._since = now

    def measured(self, kind: str, rollouts: int) -> None:
        """A search or a step is over. Its time includes reflections, the update and publishing the weights."""
        now = self._clock()
        if self._since is not None and rollouts:
            self._seconds[kind] += now - self._since  # type: ignore[assignment]
            self._rollouts[kind] += rollouts
        self._since = now

    def left(self, standing: Standing) -> float | None:
        """Seconds to the end of the run; None before the first step of this process, and once that time is over."""
        if not self._rollouts["train"]:
            return None
        train_rate = self._seconds["train"] / self._rollouts["train"]
        seconds = 0.0
        for kind, rollouts in standing.left().items():
            measured = self._rollouts[kind]
            seconds += rollouts * (self._seconds[kind] / measured if measured else train_rate)
        left = seconds - (self._clock() - (self._since or 0.0))
        return left if left > 0 else None

    @property
    def words(self) -> str:
        spent: dict[str, float] = dict(self._spent)
        spent[self._activity] = spent.get(self._activity, 0.0) + self._clock() - self._entered
        return ", ".join(f"{activity} {duration(seconds)}" for activity, seconds in spent.items())
