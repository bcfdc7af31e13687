"""Groups of rollouts -> one batch of credited calls. Pure: nothing here knows a model.

A program has one reward per run, so credit belongs to the *rollout*. The advantage is computed once per problem, over
the rollouts of the group under all candidates together (FST, section 3, eq. 3), and every LM call of a rollout inherits
it (mmGRPO, 2508.04660). A rollout may call a module any number of times: calls are not matched, padded or cut.

A metric may also score a predictor by itself. The calls of that predictor are then credited with its own scores in the
problem's group. The calls of the other predictors are credited with the reward.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Literal

import numpy as np

from dspy_fst.errors import TrainingError
from dspy_fst.outcomes.outcome import PARSE, OutcomeCounts
from dspy_fst.slow.length_penalty import Penalty
from dspy_fst.slow.losses.cispo import CISPO
from dspy_fst.slow.losses.loss import Advantage, Loss
from dspy_fst.slow.seed_kl import seed_kl_calls, seed_kl_counts
from dspy_fst.types import (
    Batch,
    Call,
    Group,
    PredictorReport,
    Rollout,
    Row,
    SeedKLRollout,
    WeightsVersion,
)

EPSILON = 1e-6
"""Added to the standard deviation; also the spread of rewards up to which a group counts as flat. Not in the paper."""


def credit(
    groups: Sequence[Group],
    *,
    loss: Loss = CISPO,
    baseline: Literal["problem", "candidate"] = "problem",
    normalize: Literal["group", "batch"] = "group",
    trained: Collection[str] | None = None,
    seed_rollouts: Sequence[SeedKLRollout] = (),
    seed_kl_alone: bool = False,
    penalty: Penalty | None = None,
    epsilon: float = EPSILON,
) -> Batch:
    """Turn the groups of one slow step into the rows of one weight update.

    A rollout's advantage is ``(r - mean) / (std + epsilon)`` over the *measured* rollouts of its group (population
    standard deviation), or what the loss has instead (see `slow.losses.loss.Advantage`). Masked rollouts enter neither
    the mean nor the gradient. Groups whose rewards are all equal are dropped (FST, section 2, after ScaleRL).

    If the metric scored a call's predictor in the rollout, the call's advantage is computed from those scores instead:
    mean and standard deviation are over the rollouts of the group in which the predictor has a score (see
    `own_scores`). When these scores are all equal, the predictor's calls are dropped and the other predictors' calls
    stay.

    With a ``penalty`` each score is first lowered by the largest penalty of the calls in the rollout that it credits.

    The loss gives each token its weight (``Loss.token_weights``), from the rows that were kept: a dropped group is
    absent from the mean rather than a zero in it.

    Args:
        groups: One group per problem; all their calls were sampled by one weight version.
        loss: How scores become advantages, and how tokens are averaged.
        baseline: ``"problem"`` compares a rollout with all of its group (FST, eq. 3); ``"candidate"`` only with the
            rollouts of its own candidate, as if these were a group of their own.
        normalize: ``"group"`` divides by the group's standard deviation (FST, eq. 3). ``"batch"`` divides by the
            standard deviation of the centred rewards of all live groups with a trained call (ScaleRL, 2510.13786), and
            separately for each predictor with scores of its own.
        trained: Predictors whose calls are trained; None means all.
        seed_rollouts: Rollouts under the program's own texts, whose calls become ``Batch.seed_kl_calls``.
        seed_kl_alone: Train on these calls even if every group has zero variance.
        penalty: What a call takes off the scores that it is credited with, e.g. `slow.length_penalty.overlong`.
        epsilon: See :data:`EPSILON`.

    Returns:
        The batch. ``rows`` is empty when no group was live; ``weights`` is ``""`` when there was no call at all.

    Raises:
        TrainingError: the calls come from several weight versions, or a reward is not a finite number.
    """
    alone = baseline == "candidate"
    if alone:
        groups = [part for group in groups for part in _by_candidate(group)]
    sampled = [rollout for group in groups for rollout in group.rollouts]
    weights = _single_version([*sampled, *(seed.rollout for seed in seed_rollouts)])
    measured = [_MeasuredGroup(group, trained, penalty) for group in groups]
    stds = _stds([stream for group in measured for stream in group.streams.values() if stream.spread > epsilon])
    stds = stds if normalize == "batch" else {}
    found = [row for group in measured for row in group.rows(loss.advantage, stds, epsilon, alone)]
    rows = tuple(_weighted(found, loss))
    counts = _counts(groups, measured, rows, trained, epsilon)
    if loss.advantage == "best":
        counts["rejected_calls"] = sum(group.credited(epsilon) for group in measured) - len(rows)
    is_trained = partial(_is_trained, trained=trained)
    held = seed_kl_calls(seed_rollouts, is_trained) if seed_rollouts else ()
    counts.update(seed_kl_counts(seed_rollouts, held, is_trained) if seed_rollouts else {})
    penalties = [each for group in measured for each in group.penalties]
    counts.update({"overlong_rollouts": sum(each > 0 for each in penalties)} if penalties else {})
    flat = Counter(name for group in measured if len(group.rollouts) > 1 for name in group.zero_advantage(epsilon))
    return Batch(
        rows=rows,
        weights=weights,
        seed_kl_calls=held if rows or seed_kl_alone else (),
        counts=counts,
        predictors=predictor_reports(groups, rows, flat),
        length_penalty=fmean(penalties) if penalties else None,
    )


def mini_batches(batch: Batch, count: int, draw: random.Random, loss: Loss = CISPO) -> list[Batch]:
    """Cut a batch into mini-batches for as many optimizer steps, e.g. 2 of 4 problems each for 8 problems.

    A problem's rows stay together, because its rollouts were compared with each other. Each mini-batch is a batch like
    any other, with token weights of its own. There are fewer than ``count`` where fewer problems kept a row.

    Args:
        draw: Shuffles the problems.
        loss: As in `credit`.
    """
    problems = list(dict.fromkeys(row.problem for row in batch.rows))
    count = min(count, len(problems))
    if count < 2:
        return [batch]
    draw.shuffle(problems)
    parts = []
    for place in range(count):
        own = {*problems[place::count]}
        rows = _weighted([row for row in batch.rows if row.problem in own], loss)
        parts.append(replace(batch, rows=tuple(rows), seed_kl_calls=batch.seed_kl_calls[place::count]))
    return parts


def _weighted(rows: Sequence[Row], loss: Loss) -> list[Row]:
    """The rows of one batch, with the weights of their tokens."""
    weights = loss.token_weights(rows)
    return [replace(row, token_weight=weight) for row, weight in zip(rows, weights, strict=True)]


def _by_candidate(group: Group) -> list[Group]:
    """Split a group into one group per candidate."""
    parts: dict[str, list[Rollout]] = {}
    for rollout in group.rollouts:
        parts.setdefault(rollout.candidate.digest, []).append(rollout)
    return [Group(group.problem, tuple(rollouts)) for rollouts in parts.values()]


@dataclass(frozen=True)
class _ScoreStream:
    """Scores of one kind in a group: the rewards of its rollouts, or the scores of one predictor."""

    predictor: str | None
    """The scored predictor; None: the rewards."""
    spread: float
    """Largest score less the smallest, before any penalty. The spread decides whether the scores are flat, because
    rounding of the mean can give equal scores a standard deviation above zero. A penalty decides nothing here: divided
    by its own deviation alone, the smallest one would push as hard as a wrong answer does."""
    std: float
    centred: Mapping[int, float]
    """Index of a rollout in the group -> its score less the mean."""

    @classmethod
    def of(
        cls, problem: int, predictor: str | None, scores: Mapping[int, float], taken: Mapping[int, float]
    ) -> "_ScoreStream":
        """The stream of these scores.

        Args:
            taken: Penalty of each rollout.
        """
        values = np.array(list(scores.values()), dtype=np.float64)
        if not np.isfinite(values).all():
            whose = "rewards" if predictor is None else f"scores of {predictor!r}"
            raise TrainingError(
                f"problem {problem}: {whose} {values.tolist()} are not all finite numbers; "
                "the metric must return one, or the rollout must be masked"
            )
        if not len(values):
            return cls(predictor, 0.0, 0.0, {})
        shaped = values - np.array([taken.get(i, 0.0) for i in scores])
        centred = dict(zip(scores, (shaped - shaped.mean()).tolist(), strict=True))
        return cls(predictor, float(np.ptp(values)), float(shaped.std()), centred)

    def advantage(self, rollout: int, rule: Advantage, std: float, epsilon: float) -> float | None:
        """Of one rollout; None: it is left out.

        Args:
            std: Divides a standardized advantage.
            epsilon: Scores that differ by no more are equal.
        """
        centred = self.centred[rollout]
        match rule:
            case "standardized":
                return centred / std
            case "centred":
                return centred
            case "leave_one_out":
                return centred * len(self.centred) / (len(self.centred) - 1)
            case "best":
                return 1.0 if centred >= max(self.centred.values()) - epsilon else None


class _MeasuredGroup:
    """The measured rollouts of one group, and the scores that their calls are credited with."""

    def __init__(self, group: Group, trained: Collection[str] | None, penalty: Penalty | None):
        self.problem = group.problem
        self.rollouts = [rollout for rollout in group.rollouts if rollout.reward is not None]
        scores: dict[str | None, dict[int, float]] = {None: {i: float(r.reward or 0) for i, r in self._numbered()}}
        scores.update(own_scores(self.rollouts))
        calls = [
            (i, call, call.predictor if i in scores.get(call.predictor, {}) else None)
            for i, rollout in self._numbered()
            for call in _trained_calls(rollout, trained)
        ]
        taken: dict[str | None, dict[int, float]] = {name: defaultdict(float) for name in scores}
        self.penalties: list[float] = []
        """Of each measured rollout; empty without a penalty."""
        if penalty is not None:
            for i, call, name in calls:
                taken[name][i] = max(taken[name][i], penalty(call))
            self.penalties = [max(of[i] for of in taken.values()) for i, _ in self._numbered()]
        streams = {name: _ScoreStream.of(group.problem, name, of, taken[name]) for name, of in scores.items()}
        self._calls = [(i, call, streams[name]) for i, call, name in calls]
        self.streams = {stream.predictor: stream for _, _, stream in self._calls}
        """The score streams that credit at least one trained call; empty in a group without trained calls."""
        self._deciding = self.streams or {None: streams[None]}
        """The streams that decide whether the group is live: without a trained call, the rewards."""

    def _numbered(self) -> list[tuple[int, Rollout]]:
        return list(enumerate(self.rollouts))

    def is_live(self, epsilon: float) -> bool:
        return any(stream.spread > epsilon for stream in self._deciding.values())

    def zero_advantage(self, epsilon: float) -> set[str]:
        """Predictors whose calls are all dropped, because the scores that credit them are all equal."""
        live = {call.predictor for _, call, stream in self._calls if stream.spread > epsilon}
        return {call.predictor for _, call, _ in self._calls} - live

    def credited(self, epsilon: float) -> int:
        """Number of calls whose scores differ."""
        return sum(stream.spread > epsilon for _, _, stream in self._calls)

    def rows(self, rule: Advantage, stds: Mapping[str | None, float], epsilon: float, alone: bool) -> Iterator[Row]:
        """The calls that are trained, their tokens without a weight so far.

        Args:
            stds: Predictor of a score stream -> the standard deviation to divide by. A stream that is not named is
                divided by its own.
            alone: Whether all its rollouts are of one candidate that is compared with itself.
        """
        for i, call, stream in self._calls:
            std = stds.get(stream.predictor, stream.std) + epsilon
            if stream.spread > epsilon and (advantage := stream.advantage(i, rule, std, epsilon)) is not None:
                yield Row(
                    prompt_ids=call.prompt_ids,
                    completion_ids=call.completion_ids,
                    logprobs=call.logprobs,
                    advantage=advantage,
                    token_weight=0.0,
                    temperature=call.temperature,
                    predictor=call.predictor,
                    problem=self.problem,
                    rollout=i,
                    candidate=self.rollouts[i].candidate.digest if alone else "",
                )


def _stds(live: Sequence[_ScoreStream]) -> dict[str | None, float]:
    """Predictor -> standard deviation of its centred scores over the batch; None -> that of the centred rewards."""
    names = {stream.predictor for stream in live}
    return {
        name: float(np.std([c for stream in live if stream.predictor == name for c in stream.centred.values()]))
        for name in names
    }


def _trained_calls(rollout: Rollout, trained: Collection[str] | None) -> list[Call]:
    return [call for call in rollout.calls if _is_trained(call, trained)]


def _is_trained(call: Call, trained: Collection[str] | None) -> bool:
    """Whether the call has a token to train on. A greedy call was not sampled, so it has no gradient."""
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
    measured: Sequence[_MeasuredGroup],
    rows: Sequence[Row],
    trained: Collection[str] | None,
    epsilon: float,
) -> Counter[str]:
    """What the batch holds and what was left out of it; a name that counted nothing reads 0."""
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
