"""A few rollouts before a run: what would go wrong in all of them shows now, and the plan learns what a rollout takes.

Refused is a metric that raises or gives no number, on examples of the trainset or of the valset, a program that never
measures, and a context that is too short. Told is a metric whose best score is above ``perfect_score``, and a program
hardly any of whose replies parse, with what was found to help (`parse_trial`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dspy_fst.errors import ConfigurationError
from dspy_fst.preflight.model_checks import context_faults
from dspy_fst.preflight.own_adapters import own_adapters
from dspy_fst.preflight.score_scale import scale_warnings, scores_of_labels
from dspy_fst.rollout.chat_adapters import adapter_in_force, describe, kept_by
from dspy_fst.rollout.rendering import unread_fault
from dspy_fst.rollout.rollouter import Task
from dspy_fst.rollout.summaries import failed_reply_of
from dspy_fst.training.parse_trial import parse_share, try_forms
from dspy_fst.training.session import Session
from dspy_fst.types import Problem, Rollout

COUNT = 4
"""Examples of each set that are tried (ours)."""
HARDLY = 0.5
"""Share of replies that parse below which other forms are tried (ours)."""


@dataclass(frozen=True)
class Spent:
    """What was played before the start; none of it is in the budget, and nothing is learnt from it."""

    rollouts: int
    sampled_tokens: int


@dataclass(frozen=True)
class FirstLook:
    """What the first rollouts measured."""

    spent: Spent
    calls_per_rollout: float
    tokens_per_rollout: float
    parsed: float | None
    """Share of the replies that parsed; None where none was read."""


def try_first(session: Session, *, warm: bool = False) -> FirstLook:
    """Play and judge them.

    Args:
        warm: Whether a warm start follows: then no other form of prompt is tried, as it is what teaches this one.

    Raises:
        ConfigurationError: with every fault that showed.
    """
    train, val = _played(session)
    session.publisher.see_texts(train)
    faults = context_faults(session.policy, [*train, *val], session.config.demo_tokens) + _teaching_faults(
        session, train
    )
    faults += _unmeasured(train, f"the first {len(train)} examples")
    faults += _unmeasured(val, f"the {len(val)} examples of the valset that were tried")
    if faults:
        raise ConfigurationError(faults)
    scores = [rollout.reward for rollout in [*train, *val] if rollout.reward is not None and not rollout.failure]
    scores += scores_of_labels(session.rollouter.reward.metric, session.trainset)
    for warning in scale_warnings(scores, session.config.perfect_score):
        session.run.emit("note", text=f"warning: {warning}")
    kept = str(describe(kept_by(session.program) or adapter_in_force()))
    if told := own_adapters([*train, *val], kept):
        session.run.emit("note", text=told)
    if told := _unnamed_calls([*train, *val]):
        session.run.emit("note", text=f"warning: {told}")
    failed = [_all_failed(train)] if all(rollout.failure for rollout in train) else []
    share = parse_share(train)
    tried = try_forms(session, share) if share is not None and share < HARDLY and not warm else None
    if failed or tried:  # one fault, one warning
        session.run.emit("note", text=f"warning: {'; '.join([*failed, *([tried.told()] if tried else [])])}")
    calls = [len(rollout.calls) for rollout in train]
    everything = [*train, *val, *(tried.rollouts if tried else ())]
    return FirstLook(
        Spent(len(everything), sum(rollout.tokens for rollout in everything)),
        calls_per_rollout=sum(calls) / len(calls),
        tokens_per_rollout=sum(rollout.tokens for rollout in train) / len(train),
        parsed=share,
    )


def _teaching_faults(session: Session, rollouts: Sequence[Rollout]) -> list[str]:
    """Why the population's texts could teach nothing in rollouts such as these, where the recipe has them teach."""
    if not session.config.distills:
        return []
    fault = unread_fault(rollouts, session.population.best, session.trainer.tokenizer)
    return [fault] if fault else []


def spread(size: int, count: int = COUNT) -> list[int]:
    """At most ``count`` indices, evenly over a set.

    >>> spread(9, 4)
    [0, 2, 4, 6]
    >>> spread(3, 4)
    [0, 1, 2]
    """
    taken = min(size, count)
    return [index * size // taken for index in range(taken)]


def _played(session: Session) -> tuple[list[Rollout], list[Rollout]]:
    """The first of the trainset, and some of the valset; together, so that an engine batches them."""
    first, some = range(min(COUNT, len(session.trainset))), spread(len(session.valset))
    candidate = session.population.best
    tasks = [Task(Problem(index, session.trainset[index]), candidate) for index in first]
    tasks += [Task(Problem(index, session.valset[index]), candidate, sample=1) for index in some]  # other seeds
    session.phase(f"before the plan: making the first {len(tasks)} rollouts")
    rollouts = session.rollouter.rollout(tasks, "preflight", anew=True)
    return rollouts[: len(first)], rollouts[len(first) :]


def _unmeasured(rollouts: Sequence[Rollout], which: str) -> list[str]:
    reasons = sorted({rollout.mask for rollout in rollouts if rollout.mask is not None})
    lost = [rollout for rollout in rollouts if rollout.mask is not None]
    if not lost or not (any(map(_is_the_metric_s, reasons)) or len(lost) == len(rollouts)):
        return []
    detail = next((rollout.feedback for rollout in lost if rollout.feedback), "")
    shown = f"{len(lost)} of {which} cannot be measured ({'; '.join(reasons)})"
    return [f"{shown}{f': {detail}' if detail else ''}; {_advice(reasons)}"]


def _unnamed_calls(rollouts: Sequence[Rollout]) -> str:
    """Empty where the program names every predictor that spoke with the policy."""
    calls = [call for rollout in rollouts for call in rollout.calls]
    unnamed = sum(not call.predictor for call in calls)
    if not unnamed:
        return ""
    return (
        f"{unnamed} of {len(calls)} calls of the first rollouts were made by predictors that the program does not "
        "name, and are not trained: hold every predictor as an attribute of the program, or in its lists and dicts"
    )


def _is_the_metric_s(reason: str) -> bool:
    return reason.startswith("metric")


def _advice(reasons: Sequence[str]) -> str:
    if any(map(_is_the_metric_s, reasons)):
        return "mend the metric; it must return a finite number, or dspy.Prediction(score=..., feedback=...)"
    if any(reason.startswith("timeout") for reason in reasons):
        return "raise rollout_timeout_s or look at what the program waits for"
    return "run the program on one example by hand to see the error"


def _all_failed(rollouts: Sequence[Rollout]) -> str:
    kinds = sorted({str(rollout.failure) for rollout in rollouts})
    told = f"every reply to the first examples failed ({', '.join(kinds)}), so the metric was not tried"
    reply = failed_reply_of(rollouts)
    return f"{told}. {reply}" if reply else told
