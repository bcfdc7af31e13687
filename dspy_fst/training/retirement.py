"""Solved problems leave the batches: ScaleRL's No-Positive-Resampling (arXiv 2510.13786).

ScaleRL keeps the pass rate of every problem, and from 0.9 on never samples the problem again: its groups would be flat,
or nearly so. Here the reports of the steps are that history, so a run that goes on retires the same problems. Searches
and validation keep them: a text that loses what was solved must show.
"""

from collections.abc import Mapping, Sequence

from dspy_fst.config import FSTConfig
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.training.plan import Plan

ROUNDING = 1e-9
"""Mean rewards that are lower than the threshold by no more than this reach it."""


def pass_reward(config: FSTConfig) -> float:
    """The mean reward of a group from which on its problem counts as solved: ``retire_solved`` of the way from
    ``failure_score`` to ``perfect_score``. With rewards of 0 and 1 that is the pass rate."""
    return config.failure_score + (config.retire_solved or 0.0) * (config.perfect_score - config.failure_score)


def retired_after(reports: Sequence[StepReport], threshold: float) -> dict[int, int]:
    """The retired problems, the least recently retired first: index -> the step whose group retired it.

    The newest group of a problem decides. One that was taken back and is solved no longer stays in the batches.

    Args:
        reports: The steps so far that the run's metric judged: what another one called solved may be unsolved.
        threshold: See `pass_reward`.
    """
    retired: dict[int, int] = {}
    for report in reports:
        for problem, reward in report.group_rewards:
            retired.pop(problem, None)
            if reward >= threshold - ROUNDING:
                retired[problem] = report.step
    return retired


def without_retired(plan: Plan, step: int, retired: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """The problems of a step's batch, and those of them that were taken back.

    A retired problem of the plan's batch is replaced by one that is not retired, in the step's own order
    (`Plan.others`), anchors first where the step may take over their rollouts. Where too few are left, those that were
    retired longest ago are taken back: a smaller batch would be noisier, and none would end the run without a word.

    Args:
        retired: As `retired_after` returned it.
    """
    planned = plan.problems(step)
    kept = [problem for problem in planned if problem not in retired]
    others, anchors = plan.others(step, {*planned, *retired}), plan.reusable(step)
    new = sorted(others, key=lambda problem: problem not in anchors)[: len(planned) - len(kept)]
    back = [*retired][: len(planned) - len(kept) - len(new)]
    return [*kept, *new, *back], back
