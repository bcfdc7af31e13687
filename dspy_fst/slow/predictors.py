"""The scores of each predictor in the groups of a step, and a report of its calls. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from dspy_fst.outcomes.outcome import PARSE
from dspy_fst.types import Call, Group, PredictorReport, Rollout, Row


def own_scores(rollouts: Sequence[Rollout]) -> dict[str, dict[int, float]]:
    """Predictor -> index of a rollout in its group -> the predictor's own score there.

    The metric gives a failed rollout no scores. If the metric scored a predictor elsewhere in the group, the failure
    score counts as that predictor's score in the failed rollout, whichever predictor caused the failure: the reward of
    a rollout does not single out a predictor either.

    Example: ``{"answer": {0: 0.8, 1: 0.0}}`` where the metric scored ``answer`` in the first rollout, and the second
    rollout failed with reward 0.
    """
    scored = {name for rollout in rollouts for name in rollout.predictor_scores}
    return {name: dict(_scores_of(name, rollouts)) for name in sorted(scored)}


def _scores_of(name: str, rollouts: Sequence[Rollout]) -> list[tuple[int, float]]:
    failed = [(i, r.reward) for i, r in enumerate(rollouts) if r.failure is not None and r.reward is not None]
    given = [(i, r.predictor_scores[name]) for i, r in enumerate(rollouts) if name in r.predictor_scores]
    return sorted(failed + given)


def predictor_reports(
    groups: Sequence[Group], rows: Sequence[Row], flat_groups: Mapping[str, int]
) -> dict[str, PredictorReport]:
    """A report for every predictor that was called or scored, by name.

    Args:
        flat_groups: Predictor -> number of groups in which all its calls had zero advantage.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    calls = [call for rollout in rollouts for call in rollout.calls]
    unparsed = Counter(rollout.failed_in for rollout in rollouts if rollout.failure == PARSE)
    own = [own_scores(group.rollouts) for group in groups]
    names = {call.predictor for call in calls if call.predictor} | {name for scores in own for name in scores}
    return {
        name: _report(
            [call for call in calls if call.predictor == name],
            [row.advantage for row in rows if row.predictor == name],
            [score for scores in own for score in scores.get(name, {}).values()],
            unparsed[name],
            flat_groups.get(name, 0),
        )
        for name in sorted(names)
    }


def _report(
    calls: Sequence[Call], advantages: Sequence[float], scores: Sequence[float], unparsed: int, flat_groups: int
) -> PredictorReport:
    return PredictorReport(
        calls=len(calls),
        tokens=sum(len(call.completion_ids) for call in calls),
        truncated=sum(call.finish_reason == "length" for call in calls),
        unparsed=unparsed,
        rows=len(advantages),
        positive_rows=sum(advantage > 0 for advantage in advantages),
        flat_groups=flat_groups,
        advantage=fmean(advantages) if advantages else None,
        score=fmean(scores) if scores else None,
    )
