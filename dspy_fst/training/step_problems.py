"""The problems of one step: the plan's own, or what `retire_solved` and `resample_flat` make of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dspy_fst.config import FSTConfig
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.training.plan import Plan
from dspy_fst.training.resampling import Credited, is_flat, refilled, resampling_counts
from dspy_fst.training.retirement import pass_reward, retired_after, without_retired
from dspy_fst.types import Batch, Group


@dataclass(frozen=True)
class StepProblems:
    """What a step samples, as indices into the trainset."""

    config: FSTConfig
    batch: Sequence[int]
    """Its own problems."""
    others: Sequence[int] = ()
    """Those that may replace problems whose groups are flat, in the order in which they are taken."""
    retired: int = 0
    """How many problems were retired before it, those that it took back included."""
    taken_back: int = 0
    has_options: bool = False
    """Whether an option of the recipe may change what the plan says."""

    def refilled(
        self, groups: Sequence[Group], credited: Credited, sample: Callable[[Sequence[int]], list[Group]]
    ) -> list[Group]:
        """The step's groups, and those in place of flat ones (`resampling.refilled`)."""
        return refilled(groups, self.others, self.config.resample_flat, partial(is_flat, credited=credited), sample)

    def counted(self, batch: Batch, groups: Sequence[Group], credited: Credited) -> Batch:
        """The batch of these groups, with counts of what the options did."""
        counts: Counter[str] = Counter()
        if self.config.retire_solved is not None:
            counts.update(retired_problems=self.retired, taken_back_problems=self.taken_back)
        if self.config.resample_flat:
            flat, best = partial(is_flat, credited=credited), self.config.perfect_score
            counts.update(resampling_counts(groups, len(self.batch), flat, self.config.worst_score, best))
            own = groups[: len(self.batch)]  # `plan.is_stuck` judges these alone
            measured = sum(len(group.rewards) > 1 for group in own)  # as `StepReport.group_rewards` has them
            judged = credited(own).counts  # parts of a group under baseline="candidate"
            counts.update(own_groups=judged["groups"], own_flat_groups=judged["flat_groups"])
            counts.update(own_measured_groups=measured)
        return replace(batch, counts=Counter({**batch.counts, **counts}))


def step_problems(plan: Plan, step: int, reports: Sequence[StepReport]) -> StepProblems:
    """The problems of a step.

    Args:
        reports: Of the steps before it that the run's metric judged.
    """
    config, own = plan.config, plan.problems(step)
    retired: dict[int, int] = {}
    back: list[int] = []
    if config.retire_solved is not None:
        retired = retired_after(reports, pass_reward(config))
        own, back = without_retired(plan, step, retired)
    others = plan.others(step, {*own, *retired}) if config.resample_flat else []
    options = bool(config.resample_flat) or config.retire_solved is not None
    return StepProblems(config, own, others, len(retired), len(back), options)


def trainset_warnings(config: FSTConfig, trainset: int) -> list[str]:
    """A sentence when an option needs other problems than those of a batch, and there are none; and one when no problem
    is met twice, so that none can be left out.

    Args:
        trainset: Number of its examples.
    """
    if config.method == "gepa":
        return []
    return _without_others(config, trainset) or _without_a_second_pass(config, trainset)


def _without_others(config: FSTConfig, trainset: int) -> list[str]:
    options = {"resample_flat": config.resample_flat, "retire_solved": config.retire_solved}
    given = [f"{name}={value:g}" for name, value in options.items() if value]
    if not given or trainset > config.problems_per_step:
        return []
    return [
        f"{' and '.join(given)}: each batch holds all {trainset} examples of the trainset (problems_per_step="
        f"{config.problems_per_step}), so no other problem can take the place of one; add examples or lower "
        "problems_per_step"
    ]


def _without_a_second_pass(config: FSTConfig, trainset: int) -> list[str]:
    updates = Plan(config, trainset).updates
    # Groups in place of flat ones may be of any problem, also of one that an earlier step has solved.
    if config.retire_solved is None or config.resample_flat or updates > trainset // config.problems_per_step:
        return []
    return [
        f"retire_solved={config.retire_solved:g} does nothing in this plan: its {updates} steps meet none of the "
        f"{trainset} examples twice. Leave it out, or plan more cycles: it acts from the second pass over the trainset "
        "on"
    ]
