"""The warm start: what a run learns from labels or from a teacher before its first search, once.

It is for a model that hardly ever parses or solves anything: rewards that are all alike teach nothing. The weights that
it leaves are those that the run's own training starts from, and the reference of its KL. The start's validation comes
before it, so that the report compares with the student as it was handed in.

What a teacher said is kept in the state before anything is learnt, so a killed run does not ask it again. The rest is
made again, with the same result: the pairs' order and the arithmetic are fixed by the run's seed.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import dspy

from dspy_fst.errors import TrainingError
from dspy_fst.fast.search_settings import own_texts
from dspy_fst.formatting.numbers import counted
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.program_checks import policies_of
from dspy_fst.preflight.reply_limits import reply_limits
from dspy_fst.preflight.warm_start_checks import lacking, learnt_from
from dspy_fst.rollout.components import demo_marks, hide_demos, with_texts
from dspy_fst.rollout.copying import copied
from dspy_fst.rollout.parse_failures import parsed_calls
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.rollout.written_replies import ReplyWriter
from dspy_fst.run.phase_reports import WarmStartReport
from dspy_fst.slow.supervised import Pair, Supervision, fine_tune
from dspy_fst.training.first_rollouts import COUNT
from dspy_fst.training.opening import trainable_copy
from dspy_fst.training.parse_trial import parse_share
from dspy_fst.training.session import Session
from dspy_fst.types import WARM_START, Problem, Rollout

TAUGHT = "taught.json"
"""Document of a state: what a teacher said, in the policy's ids."""
UNKNOWN, UNRENDERED, UNWRITTEN = "fields not in the example", "prompt not rendered", "not a reply of the chat adapter"
LONG, CUT, LOW = "longer than the context", "longer than max_tokens", "scored too low"


@dataclass
class Taught:
    """What is to be learnt, and what was left out."""

    source: str
    examples: int
    pairs: list[Pair] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """By reason."""
    rollouts: int = 0
    """Of a teacher."""
    tokens: int = 0
    """Sampled by a teacher."""

    def as_json(self) -> dict[str, object]:
        return {**vars(self), "pairs": list(map(asdict, self.pairs)), "left_out": dict(self.left_out)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Taught":
        pairs = [Pair(p["predictor"], tuple(p["prompt_ids"]), tuple(p["reply_ids"])) for p in data["pairs"]]
        return cls(**{**data, "pairs": pairs, "left_out": Counter(data["left_out"])})


def is_due(session: Session, teacher: dspy.Module | None) -> bool:
    """Whether the run has a warm start, and has it still before it."""
    asked = teacher is not None or session.config.warm_start is not None
    return asked and not session.run.state.get("warm_start") and _at_start(session)


def warm_start(session: Session, teacher: dspy.Module | None, adapters: Mapping[str, str], original: PolicyLM) -> None:
    """Learn, write the weights, and commit them. The session is over then: the run goes on with a new one.

    Args:
        teacher: Whose traces are learnt from; None: the labels.
        adapters: Predictor -> its LoRA adapter, as the trainer has it.
        original: The student's LM, which the run's engine stands in for.

    Raises:
        TrainingError: nothing was found to learn from, or supervised training failed.
    """
    began, config, run = time.monotonic(), session.config, session.run
    taught = _taught(session, teacher, original)
    if not taught.pairs:
        raise TrainingError(_nothing(taught, config.teaching_score))
    session.phase(f"warm start: learning {counted(len(taught.pairs), 'reply')}")
    how = Supervision(config.warm_start_epochs, config.warm_start_learning_rate, config.seed)
    with session.policy.handle.asleep():
        learnt = fine_tune(session.trainer, taught.pairs, how, adapters)
    path = run.weights_path(WARM_START)
    with run.writing():
        session.trainer.publish(path, WARM_START)
    report = WarmStartReport(
        source=taught.source,
        examples=taught.examples,
        pairs=dict(Counter(pair.predictor for pair in taught.pairs)),
        left_out=dict(taught.left_out),
        teacher_rollouts=taught.rollouts,
        teacher_tokens=taught.tokens,
        tokens=learnt.tokens,
        updates=learnt.updates,
        first_loss=learnt.first_loss,
        last_loss=learnt.last_loss,
        seconds=time.monotonic() - began,
    )
    run.emit("warm_start", report=report)
    session.publisher.warm_started()
    session.commit_start()
    session.policy.handle.engine.on_recovery(session.recorder.recovery, None)  # the last proof holds the trainer


def is_untold(session: Session) -> bool:
    """Whether a process ended between the run's warm start and what :func:`told_after` says of it."""
    if not session.run.state.get("warm_start") or not _at_start(session):
        return False
    return not any("spent" in event for event in session.run.events() if event["event"] == "note")


def _at_start(session: Session) -> bool:
    """Whether the run has neither searched nor made a step."""
    state = session.run.state
    return not state.get("step") and state.get("searched", -1) < 0


def told_after(session: Session, before: float | None) -> None:
    """Say how many of the first replies parse now, and warn where hardly any does.

    Args:
        before: The share before the warm start; None where another process measured it.
    """
    first = range(min(COUNT, len(session.trainset)))
    tasks = [Task(Problem(index, session.trainset[index]), session.population.best) for index in first]
    rollouts = session.rollouter.rollout(tasks, "after the warm start")
    share = parse_share(rollouts)
    if share is None:
        return
    earlier = "" if before is None else f", before it {before:.0%}"
    spent = {"rollouts": len(rollouts), "sampled_tokens": sum(rollout.tokens for rollout in rollouts)}
    told = f"after the warm start {share:.0%} of the replies to the first {len(tasks)} examples parse{earlier}"
    session.run.emit("note", text=told if share > (before or 0.0) or share == 1 else f"warning: {told}", spent=spent)


def _taught(session: Session, teacher: dspy.Module | None, original: PolicyLM) -> Taught:
    if teacher is None:
        return _by_labels(session)
    if (kept := session.run.document(TAUGHT)) is not None:
        session.recorder.note("warm start: the teacher's traces are kept from before")
        return Taught.from_json(kept)
    taught = _by_teacher(session, teacher, original)
    session.commit_start({TAUGHT: taught.as_json()})
    return taught


def _nothing(taught: Taught, least: float) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in taught.left_out.most_common()) or "no call was made"
    advice = (
        "the labels must be outputs that the chat adapter can write"
        if taught.source == "labels"
        else f"give a better teacher, or lower warm_start_score, at which {least:g} is the least reward"
    )
    return f"warm start: nothing to learn from {taught.examples} examples by {taught.source} ({reasons}); {advice}"


# ---- labels and traces as pairs of ids -----------------------------------------------------------


@dataclass(frozen=True)
class _KnownCall:
    """A call of a predictor whose outputs are known."""

    predictor: str
    fields: Mapping[str, object]
    """Inputs and outputs."""


def _by_labels(session: Session) -> Taught:
    examples = learnt_from(session.config, session.trainset)
    taught = Taught("labels", len(examples))
    names = sorted(session.trained)
    _write(session, taught, ([_KnownCall(name, example.toDict()) for name in names] for example in examples))
    return taught


def _by_teacher(session: Session, teacher: dspy.Module, original: PolicyLM) -> Taught:
    """The calls of the teacher's rollouts that score well. Its inputs and outputs are taken, and never its ids."""
    config, examples = session.config, learnt_from(session.config, session.trainset)
    session.phase(f"warm start: {len(examples)} rollouts of the teacher")
    policies = policies_of(teacher).values()
    shared = any(policy.handle is original.handle for policy in policies)
    program = trainable_copy(teacher, session.policy) if shared else copied(teacher)
    reward = Reward(session.rollouter.reward.metric, frozenset(n for n, _ in program.named_predictors()), examples)
    texts = own_texts(program, config)
    tasks = [Task(Problem(index, example), texts) for index, example in enumerate(examples)]
    try:
        rollouts = Rollouter(program, reward, config, seed=config.seed).rollout(tasks, "teacher")
    finally:
        for policy in policies if not shared else ():
            policy.release()  # its memory is needed for training
    taught = Taught("teacher", len(examples), rollouts=len(rollouts), tokens=sum(r.tokens for r in rollouts))
    _write(session, taught, (_good_calls(rollout, config.teaching_score, taught.left_out) for rollout in rollouts))
    return taught


def _good_calls(rollout: Rollout, least: float, left_out: Counter[str]) -> list[_KnownCall]:
    if rollout.reward is None or rollout.failure or rollout.reward < least:
        left_out[rollout.mask or rollout.failure or LOW] += 1
        return []
    return [_KnownCall(name, {**inputs, **said}) for name, inputs, said in parsed_calls(rollout)]


def _write(session: Session, taught: Taught, calls: Iterable[Sequence[_KnownCall]]) -> None:
    """Add these calls, one sequence for each example, as pairs; members of the population take turns."""
    writer = ReplyWriter(session.trainer.tokenizer, session.policy.checkpoint.path)
    members = [with_texts(session.program, member) for member in session.population.unique()]
    marks = list(map(demo_marks, members))
    examples = learnt_from(session.config, session.trainset)
    limits = reply_limits(session.program)
    context = session.trainer.policy.context
    for turn, (example, said) in enumerate(zip(examples, calls, strict=True)):
        shown = copied(members[turn % len(members)])
        hide_demos(shown, example, marks[turn % len(members)])
        predictors = dict(shown.named_predictors())
        for call in said:
            if call.predictor not in session.trained:
                continue
            found = _pair(writer, predictors[call.predictor], call, context, limits.get(call.predictor))
            if isinstance(found, Pair):
                taught.pairs.append(found)
            else:
                taught.left_out[found] += 1


def _pair(
    writer: ReplyWriter, predictor: dspy.Predict, call: _KnownCall, context: int | None, limit: int | None
) -> Pair | str:
    """The pair of a call, or why there is none."""
    signature = predictor.signature
    if lacking(signature, call.fields):
        return UNKNOWN
    prompt = writer.prompt(predictor, {name: call.fields[name] for name in signature.input_fields})
    reply = writer.reply(predictor, call.fields)
    if prompt is None or reply is None:
        return UNRENDERED if prompt is None else UNWRITTEN
    if limit is not None and len(reply) > limit:
        return CUT
    if context is not None and len(prompt) + len(reply) > context:
        return LONG
    return Pair(call.predictor, prompt, reply)
