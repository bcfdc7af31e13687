"""Where a run stands against its plan, and how long the rest may take."""

from collections import Counter
from collections.abc import Callable, Mapping

from dspy_fst.formatting.numbers import counted, duration
from dspy_fst.outcomes.counts import OutcomeCounts
from dspy_fst.run.directory import Event


class Standing:
    """What of the plan is done. A rollout counts when it is made, and for its search or step once that is over."""

    def __init__(self) -> None:
        self.budget: Mapping[str, int] = {}
        self.done: Counter[str] = Counter()
        """``searches``, ``updates``, and the rollouts of each: ``search``, ``train``; those of ``validation``."""
        self.masked = self.played = self.played_masked = 0

    def add(self, event: Event) -> None:
        report, step = event["report"], event["event"] == "step"
        rollouts = report["counts"].get("rollouts", 0) if step else report["rollouts"]
        self.done.update({"updates" if step else "searches": 1, "train" if step else "search": rollouts})
        self.masked += OutcomeCounts.of(report["counts"]).masked.total()
        self.played = self.played_masked = 0

    @property
    def planned(self) -> int:
        """Rollouts of the searches, at most, and of the updates; validation is outside."""
        names = ("search_rollouts", "scoring_rollouts", "training_rollouts")
        return sum(self.budget.get(name, 0) for name in names)

    @property
    def over(self) -> bool:
        """Whether searches and updates are all done."""
        whole = {name: self.budget.get(name, 0) for name in ("searches", "updates")}
        return bool(self.budget) and all(self.done[name] >= whole[name] for name in whole)

    @property
    def spent(self) -> int:
        return self.done["search"] + self.done["train"] + (0 if self.over else self.played)

    def left(self) -> dict[str, float]:
        """Rollouts to come, by what they are for."""
        searches, planned = self.budget.get("searches", 0), self.planned - self.budget.get("training_rollouts", 0)
        return {
            "search": planned * max(0, searches - self.done["searches"]) / searches if searches else 0.0,
            "train": max(0, self.budget.get("training_rollouts", 0) - self.done["train"]),
            "validation": max(0, self.budget.get("validation_rollouts", 0) - self.done["validation"]),
        }

    @property
    def progress(self) -> str:
        return ", ".join(
            f"{self.done[name]} of {counted(self.budget[name], one)}"
            for name, one in (("searches", "search"), ("updates", "update"))
            if self.budget.get(name)
        )

    @property
    def rollouts(self) -> str:
        of = f" of {self.planned:,}" if self.planned else ""
        made = self.done["search"] + self.done["train"] + self.played
        masked = self.masked + self.played_masked
        return f"{self.spent:,}{of}" + (f", {masked / made:.1%} masked" if masked else "")


class Times:
    """How long each phase took in this process, and so how long the rest will take."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._activity, self._entered = "starting", clock()
        self._spent: Counter[str] = Counter()
        self._since: float | None = None
        """When the search or step in hand began; None before the first."""
        self._seconds: Counter[str] = Counter()
        self._rollouts: Counter[str] = Counter()

    def enter(self, activity: str) -> None:
        now = self._clock()
        self._spent[self._activity] += now - self._entered  # type: ignore[assignment]
        self._activity, self._entered = activity, now
        if self._since is None:
            self._since = now

    def measured(self, kind: str, rollouts: int) -> None:
        """A search or a step is over: reflections, the update and the publishing of weights included."""
        now = self._clock()
        if self._since is not None and rollouts:
            self._seconds[kind] += now - self._since  # type: ignore[assignment]
            self._rollouts[kind] += rollouts
        self._since = now

    def left(self, standing: Standing) -> float | None:
        """Seconds to the end of the run; None before a step was measured here, and once it took longer than that."""
        if not self._rollouts["train"]:
            return None
        of_a_step = self._seconds["train"] / self._rollouts["train"]
        seconds = 0.0
        for kind, rollouts in standing.left().items():
            made = self._rollouts[kind]
            seconds += rollouts * (self._seconds[kind] / made if made else of_a_step)
        left = seconds - (self._clock() - (self._since or 0.0))
        return left if left > 0 else None

    @property
    def words(self) -> str:
        spent: dict[str, float] = dict(self._spent)
        spent[self._activity] = spent.get(self._activity, 0.0) + self._clock() - self._entered
        return ", ".join(f"{activity} {duration(seconds)}" for activity, seconds in spent.items())
