"""Groups of rollouts -> one batch of credited calls. Pure: nothing here knows a model.

A program has one reward a run, so credit belongs to the *rollout*: the advantage is computed once per problem,
over the group's runs under all candidates together (FST, section 3, eq. 3), and every LM call of a run inherits
it (mmGRPO, 2508.04660). Runs may call a module any number of times; nothing is matched, padded or cut.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from dspy_fst.errors import TrainingError
from dspy_fst.types import Batch, Call, Group, Rollout, Row, WeightsVersion

EPSILON = 1e-6
"""Added to the standard deviation, and the spread of rewards up to which a group is flat. Not in the paper."""


def credit(
    groups: Sequence[Group],
    *,
    baseline: Literal["problem", "candidate"] = "problem",
    normalize: Literal["group", "batch"] = "group",
    trained: Collection[str] | None = None,
    held: Sequence[Rollout] = (),
    epsilon: float = EPSILON,
) -> Batch:
    """Turn the groups of one slow step into the rows of one weight update.

    A rollout's advantage is ``(r - mean) / (std + epsilon)`` over the *measured* rollouts of its group (population
    standard deviation). Masked rollouts enter no mean, no baseline and no gradient. Groups whose rewards are all
    equal are dropped and not resampled (FST, section 2, after ScaleRL).

    A token weighs ``1 / (problems * tokens of its problem)``: tokens are averaged per problem, then problems
    (FST, eq. 4). ``problems`` are those that kept a row: a dropped group is out of the batch, not a zero in its
    mean, so the weights of a non-empty batch sum to 1 and the step size does not shrink as groups go flat.

    Args:
        groups: One group a problem; all their calls were sampled by one weight version.
        baseline: ``"problem"`` holds a rollout against all of its group (FST, eq. 3); ``"candidate"`` only against
            those of its own candidate, as if each candidate's rollouts of a problem were a group of their own.
        normalize: ``"group"`` divides by the group's standard deviation (FST, eq. 3); ``"batch"`` by that of the
            centred rewards of all live groups (ScaleRL, 2510.13786).
        trained: Predictors whose calls are trained; None means all.
        held: Rollouts under the program's own texts, whose calls become ``Batch.held``.
        epsilon: See :data:`EPSILON`.

    Returns:
        The batch. ``rows`` is empty when no group was live; ``weights`` is ``""`` when there was no call at all.

    Raises:
        TrainingError: the calls come from several weight versions, or a reward is not a finite number.
    """
    held_calls = tuple(call for rollout in held for call in _trained_calls(rollout, trained))
    if baseline == "candidate":
        groups = [part for group in groups for part in _by_candidate(group)]
    weights = _single_version([*(rollout for group in groups for rollout in group.rollouts), *held])
    measured = [_Measured(group) for group in groups]
    live = [group for group in measured if group.spread > epsilon]
    batch_std = float(np.std([c for group in live for c in group.centred])) if live else 0.0
    lessons = [group.lesson(batch_std if normalize == "batch" else group.std, epsilon, trained) for group in live]
    rows = _rows([lesson for lesson in lessons if lesson])
    counts = _counts(groups, measured, live, rows, trained)
    counts.update({"held_rollouts": len(held), "held_calls": len(held_calls)} if held else {})
    return Batch(rows=rows, weights=weights, held=held_calls, counts=counts)


def _by_candidate(group: Group) -> list[Group]:
    """The group's rollouts, those of each candidate apart."""
    parts: dict[str, list[Rollout]] = {}
    for rollout in group.rollouts:
        parts.setdefault(rollout.candidate.digest, []).append(rollout)
    return [Group(group.problem, tuple(rollouts)) for rollouts in parts.values()]


class _Measured:
    """The rollouts of one group that measured the policy, and their rewards about the group's mean."""

    def __init__(self, group: Group):
        self.problem = group.problem
        self.rollouts = [rollout for rollout in group.rollouts if rollout.reward is not None]
        rewards = np.array([rollout.reward for rollout in self.rollouts], dtype=np.float64)
        if not np.isfinite(rewards).all():
            raise TrainingError(
                f"problem {group.problem}: rewards {rewards.tolist()} are not all finite numbers; "
                "the metric must return one, or the rollout must be masked"
            )
        # The spread, not the std, tells a flat group: rounding of the mean gives equal rewards a std above zero.
        self.spread = float(np.ptp(rewards)) if len(rewards) > 1 else 0.0
        self.std = float(rewards.std()) if len(rewards) else 0.0
        self.centred: list[float] = (rewards - rewards.mean()).tolist() if len(rewards) else []

    def lesson(self, std: float, epsilon: float, trained: Collection[str] | None) -> list[tuple[int, Call, float]]:
        """``(problem, call, advantage)`` for every call that is trained."""
        return [
            (self.problem, call, centred / (std + epsilon))
            for rollout, centred in zip(self.rollouts, self.centred, strict=True)
            for call in _trained_calls(rollout, trained)
        ]


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
    """Calls with at least one token to learn from; a greedy call was not drawn, so it has no gradient."""
    return [
        call
        for call in rollout.calls
        if call.completion_ids and call.temperature > 0 and (trained is None or call.predictor in trained)
    ]


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
    live: Sequence[_Measured],
    rows: Sequence[Row],
    trained: Collection[str] | None,
) -> Counter[str]:
    """What the batch holds and what was left out of it; names that counted nothing read 0."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    unmeasured = sum(len(group.rollouts) < 2 for group in measured)
    counts = Counter(
        groups=len(groups),
        live_groups=len(live),
        unmeasured_groups=unmeasured,
        flat_groups=len(groups) - len(live) - unmeasured,
        rollouts=len(rollouts),
        calls=sum(len(rollout.calls) for rollout in rollouts),
        truncated_calls=sum(call.finish_reason == "length" for rollout in rollouts for call in rollout.calls),
        no_trained_calls=sum(r.reward is not None and not _trained_calls(r, trained) for r in rollouts),
        greedy_calls=sum(call.temperature == 0 for rollout in rollouts for call in rollout.calls),
        reasoning_tokens=sum(call.reasoning_tokens for rollout in rollouts for call in rollout.calls),
        rows=len(rows),
        tokens=sum(len(row.completion_ids) for row in rows),
    )
    counts.update(f"masked: {rollout.mask}" for rollout in rollouts if rollout.mask is not None)
    counts.update(f"failed: {rollout.failure}" for rollout in rollouts if rollout.failure is not None)
    return counts
