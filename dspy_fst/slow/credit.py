"""Groups of rollouts -> one batch of credited calls. Pure: nothing here knows a model.

A program has one reward a run, so credit belongs to the *rollout*: the advantage is computed once per problem,
over the group's runs under all candidates together (FST, section 3, eq. 3), and every LM call of a run inherits
it (mmGRPO, 2508.04660). Runs may call a module any number of times; nothing is matched, padded or cut.

A metric may also score a predictor by itself. Its calls are then held against its own scores in the problem's group,
and the run's reward stays with the others.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dspy_fst.errors import TrainingError
from dspy_fst.outcomes.counts import OutcomeCounts
from dspy_fst.slow.predictors import own_scores, predictor_reports
from dspy_fst.types import Batch, Call, Group, Rollout, Row, SeedKLCall, SeedKLRollout, WeightsVersion

EPSILON = 1e-6
"""Added to the standard deviation, and the spread of rewards up to which a group is flat. Not in the paper."""


def credit(
    groups: Sequence[Group],
    *,
    baseline: Literal["problem", "candidate"] = "problem",
    normalize: Literal["group", "batch"] = "group",
    trained: Collection[str] | None = None,
    held: Sequence[SeedKLRollout] = (),
    held_alone: bool = False,
    epsilon: float = EPSILON,
) -> Batch:
    """Turn the groups of one slow step into the rows of one weight update.

    A rollout's advantage is ``(r - mean) / (std + epsilon)`` over the *measured* rollouts of its group (population
    standard deviation). Masked rollouts enter no mean, no baseline and no gradient. Groups whose rewards are all
    equal are dropped and not resampled (FST, section 2, after ScaleRL).

    A call whose predictor has a score of its own in its rollout gets the same of those scores: mean and standard
    deviation are over the rollouts of the group in which the predictor has one (see `own_scores`). When they are all
    equal its calls are dropped, and the other predictors' stay.

    A token weighs ``1 / (problems * tokens of its problem)``: tokens are averaged per problem, then problems
    (FST, eq. 4). ``problems`` are those that kept a row: a dropped group is out of the batch, not a zero in its
    mean, so the weights of a non-empty batch sum to 1 and the step size does not shrink as groups go flat.

    Args:
        groups: One group a problem; all their calls were sampled by one weight version.
        baseline: ``"problem"`` holds a rollout against all of its group (FST, eq. 3); ``"candidate"`` only against
            those of its own candidate, as if each candidate's rollouts of a problem were a group of their own.
        normalize: ``"group"`` divides by the group's standard deviation (FST, eq. 3); ``"batch"`` by that of the
            centred rewards of all live groups with a trained call (ScaleRL, 2510.13786), each predictor's own scores
            apart.
        trained: Predictors whose calls are trained; None means all.
        held: Rollouts under the program's own texts, whose calls become ``Batch.held``.
        held_alone: Whether they are learnt from although no group was live.
        epsilon: See :data:`EPSILON`.

    Returns:
        The batch. ``rows`` is empty when no group was live; ``weights`` is ``""`` when there was no call at all.

    Raises:
        TrainingError: the calls come from several weight versions, or a reward is not a finite number.
    """
    if baseline == "candidate":
        groups = [part for group in groups for part in _by_candidate(group)]
    weights = _single_version([*(r for group in groups for r in group.rollouts), *(one.rollout for one in held)])
    measured = [_Measured(group, trained) for group in groups]
    stds = _stds([strand for group in measured for strand in group.credited.values() if strand.spread > epsilon])
    lessons = [list(group.lesson(stds if normalize == "batch" else {}, epsilon)) for group in measured]
    rows = _rows([lesson for lesson in lessons if lesson])
    counts = _counts(groups, measured, rows, trained, epsilon)
    kept = _held(held, trained)
    counts.update(_held_counts(held, kept, trained))
    flat = Counter(name for group in measured if len(group.rollouts) > 1 for name in group.untaught(epsilon))
    reports = predictor_reports(groups, rows, flat)
    return Batch(rows=rows, weights=weights, held=kept if rows or held_alone else (), counts=counts, predictors=reports)


def _held(rollouts: Sequence[SeedKLRollout], trained: Collection[str] | None) -> tuple[SeedKLCall, ...]:
    return tuple(
        SeedKLCall(call, prompt)
        for one in rollouts
        for call, prompt in zip(one.rollout.calls, one.start_prompts, strict=True)
        if prompt is not None and _is_trained(call, trained)
    )


def _held_counts(
    rollouts: Sequence[SeedKLRollout], held: Sequence[SeedKLCall], trained: Collection[str] | None
) -> dict[str, int]:
    if not rollouts:
        return {}
    calls = sum(len(_trained_calls(one.rollout, trained)) for one in rollouts)
    return {
        "held_rollouts": len(rollouts),
        "held_calls": len(held),
        "held_calls_unread": calls - len(held),
        "held_tokens": sum(one.rollout.tokens for one in rollouts),
    }


def _by_candidate(group: Group) -> list[Group]:
    """The group's rollouts, those of each candidate apart."""
    parts: dict[str, list[Rollout]] = {}
    for rollout in group.rollouts:
        parts.setdefault(rollout.candidate.digest, []).append(rollout)
    return [Group(group.problem, tuple(rollouts)) for rollouts in parts.values()]


@dataclass(frozen=True)
class _Strand:
    """Scores of one kind in a group: the rewards of its runs, or the scores of one predictor."""

    predictor: str | None
    """None: the rewards."""
    spread: float
    """Largest less smallest. This and not the std tells a flat strand: rounding of the mean gives equal scores a std
    above zero."""
    std: float
    centred: Mapping[int, float]
    """Place of a rollout -> its score less the mean."""

    @classmethod
    def of(cls, problem: int, predictor: str | None, scores: Mapping[int, float]) -> "_Strand":
        values = np.array(list(scores.values()), dtype=np.float64)
        if not np.isfinite(values).all():
            whose = "rewards" if predictor is None else f"scores of {predictor!r}"
            raise TrainingError(
                f"problem {problem}: {whose} {values.tolist()} are not all finite numbers; "
                "the metric must return one, or the rollout must be masked"
            )
        if not len(values):
            return cls(predictor, 0.0, 0.0, {})
        centred = dict(zip(scores, (values - values.mean()).tolist(), strict=True))
        return cls(predictor, float(np.ptp(values)), float(values.std()), centred)


class _Measured:
    """The rollouts of one group that measured the policy, and the scores that their calls are credited with."""

    def __init__(self, group: Group, trained: Collection[str] | None):
        self.problem = group.problem
        self.rollouts = [rollout for rollout in group.rollouts if rollout.reward is not None]
        scores: dict[str | None, dict[int, float]] = {None: {i: float(r.reward or 0) for i, r in self._numbered()}}
        scores.update(own_scores(self.rollouts))
        strands = {name: _Strand.of(group.problem, name, of) for name, of in scores.items()}
        self._calls = [
            (i, call, strands[call.predictor if i in scores.get(call.predictor, {}) else None])
            for i, rollout in self._numbered()
            for call in _trained_calls(rollout, trained)
        ]
        self.credited = {strand.predictor: strand for _, _, strand in self._calls}
        """Those that a trained call is credited by; none in a group without trained calls."""
        self.strands = self.credited or {None: strands[None]}
        """The same; of a group without trained calls the rewards', which tell whether it was live."""

    def _numbered(self) -> list[tuple[int, Rollout]]:
        return list(enumerate(self.rollouts))

    def is_live(self, epsilon: float) -> bool:
        return any(strand.spread > epsilon for strand in self.strands.values())

    def untaught(self, epsilon: float) -> set[str]:
        """Predictors whose calls taught nothing, as their scores were all alike."""
        taught = {call.predictor for _, call, strand in self._calls if strand.spread > epsilon}
        return {call.predictor for _, call, _ in self._calls} - taught

    def lesson(self, stds: Mapping[str | None, float], epsilon: float) -> Iterator[tuple[int, Call, float]]:
        """``(problem, call, advantage)`` for every call that is trained.

        Args:
            stds: What to divide by, by the strand's predictor; without it by the strand's own.
        """
        for i, call, strand in self._calls:
            if strand.spread > epsilon:
                yield self.problem, call, strand.centred[i] / (stds.get(strand.predictor, strand.std) + epsilon)


def _stds(live: Sequence[_Strand]) -> dict[str | None, float]:
    """Standard deviation of a batch's centred scores, by predictor; None: of its rewards."""
    names = {strand.predictor for strand in live}
    return {
        name: float(np.std([c for strand in live if strand.predictor == name for c in strand.centred.values()]))
        for name in names
    }


def _rows(lessons: Sequence[Sequence[tuple[int, Call, float]]]) -> tuple[Row, ...]:
    rows = []
    for lesson in lessons:
        tokens = sum(len(call.completion_ids) for _, call, _ in lesson)
        for problem, call, advantage in lesson:
            rows.append(
                Row(
                    prompt_ids=call.prompt_ids,
                    completion_ids=call.completion_ids,
                    logprobs=call.logprobs,
                    advantage=advantage,
                    token_weight=1 / (len(lessons) * tokens),
                    temperature=call.temperature,
                    predictor=call.predictor,
                    problem=problem,
                )
            )
    return tuple(rows)


def _trained_calls(rollout: Rollout, trained: Collection[str] | None) -> list[Call]:
    return [call for call in rollout.calls if _is_trained(call, trained)]


def _is_trained(call: Call, trained: Collection[str] | None) -> bool:
    """Whether it has a token to learn from; a greedy call was not drawn, so it has no gradient."""
    return bool(call.completion_ids) and call.temperature > 0 and (trained is None or call.predictor in trained)


def _single_version(rollouts: Sequence[Rollout]) -> WeightsVersion:
    versions = {call.weights for rollout in rollouts for call in rollout.calls}
    if len(versions) > 1:
        raise TrainingError(
            f"a batch mixes calls sampled by weights {sorted(versions)}; sample all groups of a step "
            "after the last publish and before the next"
        )
    return next(iter(versions), "")


def _counts(
    groups: Sequence[Group],
    measured: Sequence[_Measured],
    rows: Sequence[Row],
    trained: Collection[str] | None,
    epsilon: float,
) -> Counter[str]:
    """What the batch holds and what was left out of it; names that counted nothing read 0."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    calls = [call for rollout in rollouts for call in rollout.calls]
    unmeasured = sum(len(group.rollouts) < 2 for group in measured)
    live = sum(group.is_live(epsilon) for group in measured)
    counts = Counter(
        groups=len(groups),
        live_groups=live,
        unmeasured_groups=unmeasured,
        flat_groups=len(groups) - live - unmeasured,
        rollouts=len(rollouts),
        calls=len(calls),
        truncated_calls=sum(call.finish_reason == "length" and not call.cut_by_context for call in calls),
        truncated_by_context=sum(call.cut_by_context for call in calls),
        continued_calls=sum(call.turn == "continued" for call in calls),
        rerendered_calls=sum(call.turn == "rerendered" for call in calls),
        unnamed_calls=sum(not call.predictor for call in calls),
        no_trained_calls=sum(r.reward is not None and not _trained_calls(r, trained) for r in rollouts),
        greedy_calls=sum(call.temperature == 0 and (trained is None or call.predictor in trained) for call in calls),
        reasoning_tokens=sum(call.reasoning_tokens for call in calls),
        rows=len(rows),
        tokens=sum(len(row.completion_ids) for row in rows),
    )
    counts.update(OutcomeCounts.over(rollout.outcome for rollout in rollouts).labels)
    return counts
