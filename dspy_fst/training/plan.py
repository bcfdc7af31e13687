"""What a run does and when: the problems of each step, what it will spend, and what of it is still due.

`Plan` is a function of the recipe and the seed alone. `Schedule` decides from the plan, the committed state and the
step reports, so a run that goes on decides as an uninterrupted one does.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from dspy_fst.config import FSTConfig
from dspy_fst.run.ending import StopReason, complete
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.run.state import StateFields


@dataclass(frozen=True)
class Cycle:
    """One alternation: a search of that many fresh rollouts (0: none), then the updates of these steps."""

    index: int
    search_budget: int
    steps: range


@dataclass(frozen=True)
class Budget:
    """What a run is planned to spend; every figure counts the whole run."""

    searches: int
    search_rollouts: int
    """Fresh rollouts of the searches."""
    overshoot_rollouts: int
    """At most so many on top: each candidate that a search accepts last may add one pass over its anchors."""
    scoring_rollouts: int
    """Rollouts that score the carried populations before each search."""
    training_rollouts: int
    """At most, ``resampled_rollouts`` and ``reused_rollouts`` included."""
    reused_rollouts: int
    """At most so many of them are those of a search (``reuse_rollouts``), which are paid for there."""
    resampled_rollouts: int
    """At most so many in place of flat groups (``resample_flat``)."""
    validation_rollouts: int
    """Of the start, in between and of the end, at most; outside of what the run is planned to spend."""
    updates: int


class Plan:
    """The schedule of a run over ``size`` training problems.

    Args:
        origin: What a continued training starts from; it goes into the shuffles, so that going on from a compiled
            program does not show the same problems in the same order again.
    """

    def __init__(self, config: FSTConfig, size: int, origin: str = ""):
        self.config, self.size, self.origin = config, size, origin
        self._orders: dict[int, list[int]] = {}
        self._arranged: dict[int, list[list[int]]] = {}
        self.cycles = _schedule(config, self.search_budget(0))

    @property
    def updates(self) -> int:
        """Steps of all cycles."""
        return sum(len(cycle.steps) for cycle in self.cycles)

    @property
    def searches_late(self) -> bool:
        """Whether the only search comes after updates (rl_then_gepa)."""
        return any(cycle.search_budget for cycle in self.cycles) and not self.cycles[0].search_budget

    def problems(self, step: int) -> list[int]:
        """Problems of a step's batch, all different: a walk through one seeded shuffle of the trainset per epoch.

        With ``reuse_rollouts`` the step after a search has anchors first (`_anchors_first`).
        ``retire_solved`` and ``resample_flat`` may have the step sample others (`training.step_problems`).
        An epoch ends with its last full batch; whom the remainder leaves out changes with the shuffle.
        """
        cycle, place = divmod(step, self.config.steps_per_cycle)
        if not self._reuses(cycle):
            return self._walk(step)
        if cycle not in self._arranged:
            self._arranged[cycle] = self._anchors_first(cycle)
        return self._arranged[cycle][place]

    @property
    def first_steps(self) -> dict[int, int]:
        """Steps that may take over rollouts of the search just before them, and their cycles (``reuse_rollouts``)."""
        return {cycle.steps[0]: cycle.index for cycle in self.cycles if self._reuses(cycle.index)}

    def reusable(self, step: int) -> set[int]:
        """Problems whose rollouts a step may take over: the anchors of the search just before it, if there is one."""
        cycle = self.first_steps.get(step)
        return set() if cycle is None else {*self.anchors(cycle)}

    def _reuses(self, cycle: int) -> bool:
        """Whether a step of this cycle may take over rollouts of the cycle's search."""
        planned = self.cycles[cycle] if cycle < len(self.cycles) else None
        return self.config.reuse_rollouts and planned is not None and bool(planned.search_budget and planned.steps)

    def _anchors_first(self, cycle: int) -> list[list[int]]:
        """The batches of a cycle's steps, with as many anchors in the first one as it can hold.

        Problems change places only within the epoch of the first step. So an epoch shows each of its problems once, and
        the same ones as without the exchange. Where all problems of the cycle are anchors, none changes its place.
        """
        size = self.config.problems_per_step
        steps = self.cycles[cycle].steps
        epoch = [step for step in steps if step // (self.size // size) == steps[0] // (self.size // size)]
        planned, anchors = [problem for step in epoch for problem in self._walk(step)], {*self.anchors(cycle)}
        first = [problem for problem in planned if problem in anchors][:size]
        order = [*first, *(problem for problem in planned if problem not in first)]
        exchanged = [order[i : i + size] for i in range(0, len(order), size)]
        return exchanged + [self._walk(step) for step in steps[len(epoch) :]]

    def _walk(self, step: int) -> list[int]:
        """The problems of a step's batch as the epoch's shuffle has them."""
        size = self.config.problems_per_step
        epoch, place = divmod(step, self.size // size)
        return self._order(epoch)[place * size : (place + 1) * size]

    def others(self, step: int, taken: Collection[int]) -> list[int]:
        """The problems that are not ``taken``, in an order of the step: they may replace problems of its batch."""
        order = list(range(self.size))
        random.Random(f"{self.config.seed} others {step}{self.origin}").shuffle(order)
        return [problem for problem in order if problem not in taken]

    def lookahead(self, cycle: int) -> list[int]:
        """D_c: the planned problems of the cycle's steps, without repetition (paper, section 3)."""
        first = cycle * self.config.steps_per_cycle
        steps = range(first, first + self.config.steps_per_cycle)
        return list(dict.fromkeys(problem for step in steps for problem in self._walk(step)))

    def anchors(self, cycle: int) -> list[int]:
        """A_c: the part of D_c that scores candidates and feeds reflections."""
        lookahead = self.lookahead(cycle)
        random.Random(f"{self.config.seed} anchors {cycle}{self.origin}").shuffle(lookahead)
        return lookahead[: self.config.anchor_count]

    def budget(self, validation_size: int) -> Budget:
        """What the run will spend; rollouts are runs of the whole program."""
        config = self.config
        searches = [cycle for cycle in self.cycles if cycle.search_budget]
        anchors = len(self.anchors(0))
        # The first search starts from one text; later ones from up to K.
        carried = sum(config.population_size if cycle.index else 1 for cycle in searches)
        resampled = self.updates * self.replaceable * config.group_size
        training = self.updates * config.problems_per_step * config.rollouts_per_problem
        return Budget(
            searches=len(searches),
            search_rollouts=sum(cycle.search_budget for cycle in searches),
            overshoot_rollouts=anchors * config.proposals_at_once * len(searches),
            scoring_rollouts=carried * anchors,
            training_rollouts=training + resampled,
            reused_rollouts=self._reusable() * config.population_size,
            resampled_rollouts=resampled,
            validation_rollouts=validation_size * config.validation_samples * self._validated_candidates(),
            updates=self.updates,
        )

    def _reusable(self) -> int:
        """Anchors among the problems of all steps that come after a search, at most."""
        if self.config.retire_solved is not None:  # another anchor may take the place of any problem
            return sum(min(self.config.problems_per_step, len(self.reusable(step))) for step in self.first_steps)
        return sum(len({*self.problems(step)} & self.reusable(step)) for step in self.first_steps)

    @property
    def replaceable(self) -> int:
        """Groups that a step may sample in place of flat ones: so many rounds, or until every problem was sampled."""
        size = self.config.problems_per_step
        return min(self.config.resample_flat * size, self.size - size) if self.config.resample_flat else 0

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows this step; that of the run's end comes on top."""
        every = self.config.validate_every
        if every == "cycle":
            return any(cycle.steps and step == cycle.steps[-1] for cycle in self.cycles)
        return every is not None and (step + 1) % every == 0

    def _validated_candidates(self) -> int:
        """The student, then the population each time. The end is not played again where its state was just measured."""
        between = [step for cycle in self.cycles for step in cycle.steps if self.validates_after(step)]
        last = self.cycles[-1].steps
        again = bool(between) and bool(last) and between[-1] == last[-1]
        return 1 + self.config.population_size * (len(between) + (not again))

    def search_budget(self, cycle: int) -> int:
        """Fresh rollouts of a search over the cycle's anchors, at least one minibatch."""
        passes = round(self.config.search_passes * len(self.anchors(cycle)))
        return max(self.config.search_rollouts or passes, self.config.reflection_minibatch)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(self.size))
            random.Random(f"{self.config.seed} epoch {epoch}{self.origin}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]


def _schedule(config: FSTConfig, budget: int) -> tuple[Cycle, ...]:
    """The cycles of each method. Baselines spend what Fast-Slow Training spends, at other times."""
    steps, cycles = config.steps_per_cycle, config.cycles
    whole = budget * cycles
    budgets = _shares(whole, cycles, config.first_search_share)
    at = [range(index * steps, (index + 1) * steps) for index in range(cycles)]
    end = cycles * steps
    match config.method:
        case "fst" | "distill":
            return tuple(Cycle(i, budgets[i], at[i]) for i in range(cycles))
        case "rl":
            return tuple(Cycle(i, 0, at[i]) for i in range(cycles))
        case "gepa":
            return (Cycle(0, whole, range(0)),)
        case "gepa_then_rl":
            return tuple(Cycle(i, whole if i == 0 else 0, at[i]) for i in range(cycles))
        case "rl_then_gepa":
            return (*(Cycle(i, 0, at[i]) for i in range(cycles)), Cycle(cycles, whole, range(end, end)))


def _shares(whole: int, cycles: int, first: float | None) -> list[int]:
    """Fresh rollouts of each cycle's search; what does not divide evenly goes to the first."""
    if cycles == 1 or first is None:
        return [whole // cycles] * cycles
    rest = round(whole * (1 - first)) // (cycles - 1)
    return [whole - rest * (cycles - 1), *[rest] * (cycles - 1)]


class Schedule:
    """The order of a run's cycles and steps, and its end.

    Args:
        plan: All that the run will do.
        config: The recipe.
        state: The newest committed state; empty before the first.
        reports: Of the steps so far; grows while the run goes on.
    """

    def __init__(self, plan: Plan, config: FSTConfig, state: Callable[[], StateFields], reports: Sequence[StepReport]):
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


def is_stuck(report: StepReport, flat_share: float, perfect_score: float) -> bool:
    """Whether ``flat_share`` of the step's groups have zero variance while the mean reward is below half of perfect.

    Only the groups of the step's own problems count. With ``resample_flat`` groups of others follow a stuck step's flat
    ones, and would make their share smaller.
    """
    counts, reward = report.counts, report.reward
    flat = counts.get("own_flat_groups", counts.get("flat_groups", 0))
    groups = counts.get("own_groups", counts.get("groups", 0) - counts.get("resampled_groups", 0))
    if (own := counts.get("own_measured_groups")) is not None:
        rewards = [each for _, each in report.group_rewards[:own]]
        reward = fmean(rewards) if rewards else None
    return flat / max(1, groups) >= flat_share and not (reward is not None and reward >= perfect_score / 2)
