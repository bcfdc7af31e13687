"""Hardly any reply parses, or none is right: what would help on this very model? A trial, which changes nothing.

Tried on a few examples are DSPy's other forms of prompt (ChatAdapter, JSONAdapter, XMLAdapter), two labelled examples
as demos, both together, a lower temperature, and that with the best of the others. What the trial finds is told with
the lines of code that use it, and kept in the run's events as ``parse_trial``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.config import FSTConfig
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.warm_start_checks import lacking
from dspy_fst.rollout.call_recorder import is_recorded
from dspy_fst.rollout.chat_adapters import adapter_in_force, code_of, describe, keep, kept_by
from dspy_fst.rollout.components import in_python, with_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.training.session import Session
from dspy_fst.types import Population, Problem, Rollout

FORMS: tuple[type[dspy.Adapter], ...] = (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter)
DEMOS = 2
"""Labelled examples that are shown; they come from the end of the trainset, and are not among those tried (ours)."""
COOLER = 0.5
"""The lower temperature that is tried (ours)."""
EXAMPLES = 8
"""Different examples that are tried at most (ours)."""
NO_DEMOS = "the examples hold no output field of a predictor that does not parse"
HAVE_DEMOS = "the predictors show some already"


class Subject(Protocol):
    """What is tried: a run, or as much of one as `dspy-fst check --measure` has."""

    @property
    def program(self) -> dspy.Module:
        """Its predictors speak with ``policy``."""

    @property
    def trainset(self) -> Sequence[dspy.Example]: ...

    @property
    def population(self) -> Population:
        """Its best texts are the ones that are spoken."""

    @property
    def policy(self) -> PolicyLM: ...

    @property
    def config(self) -> FSTConfig:
        """Says how many rollouts (``parse_trial``)."""

    @property
    def rollouter(self) -> Rollouter:
        """Says how rollouts are made, and what they earn."""


@dataclass(frozen=True)
class Setup:
    """One way of asking."""

    adapter: dspy.Adapter
    """Its class's name is what is told, e.g. ``JSONAdapter``."""
    demos: bool = False
    temperature: float | None = None
    """None is the program's own."""

    def __str__(self) -> str:
        parts = [type(self.adapter).__name__]
        parts += [f"{DEMOS} demos"] if self.demos else []
        parts += [f"temperature {self.temperature:g}"] if self.temperature is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Attempt:
    """A setup and what was played in it."""

    setup: Setup
    rollouts: tuple[Rollout, ...] = field(repr=False)

    @property
    def share(self) -> float | None:
        """Share of the replies that parsed; None where no reply was read."""
        return parse_share(self.rollouts)

    @property
    def reward(self) -> float | None:
        """Mean reward; None where nothing was measured. It means something only where the metric was asked."""
        rewards = [rollout.reward for rollout in self.rollouts if rollout.reward is not None]
        return sum(rewards) / len(rewards) if rewards else None

    @property
    def rank(self) -> float:
        """The share; what was not measured stands behind everything that was."""
        return -1.0 if self.share is None else self.share

    def __str__(self) -> str:
        share = "none read" if self.share is None else f"{self.share:.0%}"
        return f"  {share:>9}  {self.setup}{self._masked}"

    @property
    def with_reward(self) -> str:
        """The row of a trial in which the metric was asked."""
        reward, share = ("none read" if of is None else of for of in (self.reward, self.share))
        shown = (f"{of:{form}}" if isinstance(of, float) else of for of, form in ((reward, ".3f"), (share, ".0%")))
        return "  {:>9}  {:>9}  ".format(*shown) + f"{self.setup}{self._masked}"

    @property
    def _masked(self) -> str:
        masks = OutcomeCounts.over(rollout.outcome for rollout in self.rollouts).masked
        reasons = f" ({masks.total()} of {len(self.rollouts)} rollouts masked: {'; '.join(sorted(masks))})"
        return reasons if masks else ""


@dataclass(frozen=True)
class Trial:
    """What was tried, and what came of it."""

    before: float
    """Share of the first replies that parsed."""
    attempts: tuple[Attempt, ...]
    current: dspy.Adapter
    """The adapter that the program speaks through now."""
    keeps_adapter: bool
    """Whether the program keeps it (a trained one), whatever DSPy is set to."""
    speaking: tuple[str, ...]
    """Predictors that speak with the policy."""
    shown_to: tuple[str, ...]
    """Those of them that can be shown labelled examples."""
    reward_before: float | None = None
    """Mean reward that the program earns as it asks now; None where the metric was not asked, and attempts are ranked
    by the share of replies that parsed."""
    have_demos: bool = False
    """Whether a predictor shows examples already."""
    labels_teach: bool = False
    """Whether an example holds all inputs and outputs of a predictor, so that a warm start can learn from it."""

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        return tuple(rollout for attempt in self.attempts for rollout in attempt.rollouts)

    @property
    def ranked(self) -> list[Attempt]:
        """The best first."""
        return sorted(self.attempts, key=lambda one: _rank(one, scored=self.reward_before is not None), reverse=True)

    @property
    def best(self) -> Attempt | None:
        """The attempt that did better than the program as it asks now; None where none did."""
        first, scored = self.ranked[0], self.reward_before is not None
        now = self.before if self.reward_before is None else self.reward_before
        return first if _rank(first, scored=scored)[0] > now else None

    def told(self) -> str:
        """A table and what to write, as text."""
        lines = [self._heading]
        lines += [str(one) if self.reward_before is None else one.with_reward for one in self.ranked]
        if not self.shown_to:
            lines.append(f"  demos were not tried: {HAVE_DEMOS if self.have_demos else NO_DEMOS}")
        lines.append(self._warm_start)
        if (best := self.best) is None:
            return "\n".join([*lines, self._nothing_helps])
        code = [f"  {line}" for line in self.code(best.setup)]
        where = "before compile() or where a project's module makes the program"
        return "\n".join([*lines, f"For the first of them write, {where}:", *code])

    @property
    def _warm_start(self) -> str:
        """The other way: not another form, but weights that know this one."""
        way = "set warm_start='labels'" if self.labels_teach else "give compile() a teacher=program that speaks it"
        return f"  or teach the model the form that it is asked for now, before the first search: {way}"

    @property
    def _heading(self) -> str:
        each, whole = len(self.rollouts) // len(self.attempts), len(self.rollouts)
        if self.reward_before is None:
            return (
                f"of the replies to the first examples {self.before:.0%} parse. Tried on this model, with {each} "
                f"rollouts each ({whole} in all; nothing of it is used by itself):"
            )
        return (
            f"Tried on this model, with {each} rollouts each ({whole} in all; nothing of it is used by itself), mean "
            "reward and share of the replies that parsed:"
        )

    @property
    def _nothing_helps(self) -> str:
        if self.reward_before is None:
            return "Nothing of it helps: take a stronger instruct model, or fewer and simpler output fields"
        return "Nothing of it helps: give easier problems, a metric with partial credit, or a stronger model"

    def record(self) -> dict[str, object]:
        """The trial as plain data: ``before``, ``attempts``, ``helped`` (empty where nothing did) and ``told``."""
        best = self.best
        return {
            "before": self.before,
            "reward_before": self.reward_before,
            "attempts": [{"form": str(a.setup), "share": a.share, "reward": a.reward} for a in self.ranked],
            "helped": "" if best is None else f"{best.setup} ({self._what_it_did(best)})",
            "told": self.told(),
        }

    def _what_it_did(self, attempt: Attempt) -> str:
        """By what it was ranked: ``"75% parsed"``, or ``"mean reward 0.250, 75% parsed"``."""
        parsed = "no reply read" if attempt.share is None else f"{attempt.share:.0%} parsed"
        scored = self.reward_before is not None and attempt.reward is not None
        return f"mean reward {attempt.reward:.3f}, {parsed}" if scored else parsed

    def code(self, setup: Setup) -> Iterator[str]:
        """Lines of Python that have ``program`` ask in this way; they use ``dspy``, ``program`` and ``trainset``."""
        if setup.adapter is not self.current:
            yield from code_of(describe(setup.adapter))
            if self.keeps_adapter:
                yield "from dspy_fst.rollout.chat_adapters import keep"
                yield "keep(program, adapter)  # a trained program keeps its adapter, whatever DSPy is set to"
            else:
                yield "dspy.configure(adapter=adapter)"
        if setup.demos:
            yield f"demos, trainset = trainset[-{DEMOS}:], trainset[:-{DEMOS}]"
            for name in self.shown_to:
                yield f"{in_python(name)}.demos = [*{in_python(name)}.demos, *demos]"
        if setup.temperature is not None:
            first = in_python(self.speaking[0])
            yield f"lm = ({first}.lm or dspy.settings.lm).copy(temperature={setup.temperature:g})"
            for name in self.speaking:
                yield f"{in_python(name)}.lm = lm"


def _rank(attempt: Attempt, *, scored: bool) -> tuple[float, ...]:
    """The mean reward before the share, where the metric was asked."""
    reward = float("-inf") if attempt.reward is None else attempt.reward
    return (reward, attempt.rank) if scored else (attempt.rank,)


def parse_share(rollouts: Sequence[Rollout]) -> float | None:
    """Share of the policy's replies that parsed; None where no reply was read."""
    failed = [
        isinstance(said, FailedPrediction)
        for rollout in rollouts
        for predictor, _, said in rollout.trace
        if predictor is not None and is_recorded(getattr(predictor, "lm", None) or dspy.settings.lm)
    ]
    return 1 - sum(failed) / len(failed) if failed else None


def try_forms(session: Session, before: float, reward_before: float | None = None) -> Trial | None:
    """The trial of a run, announced while it goes on and kept in the events; None where ``parse_trial`` is 0.

    Args:
        session: The run.
        before: Share of the replies that parse now.
        reward_before: Mean reward now, where every reply is wrong and the metric shall be asked.
    """
    rollouts = session.config.parse_trial
    if not rollouts:
        return None
    session.phase("trying other forms of prompt", quiet=True)
    why = "hardly any reply parses" if reward_before is None else "every reply scores alike"
    session.recorder.note(f"{why}: {announced(session.program, session.trainset, rollouts)}")
    found = trial(session, before, reward_before)
    session.observer.keep_trial(found.record())
    return found


def announced(program: dspy.Module, trainset: Sequence[dspy.Example], rollouts: int) -> str:
    """What a trial is about to do, so that the wait is not taken for a hang."""
    demos = list(trainset[-DEMOS:]) if len(trainset) > DEMOS else []
    forms = _forms(kept_by(program) or adapter_in_force(), demos=any(_fits(of, demos) for _, of in _speaking(program)))
    count = len(list(forms)) + 2  # at most: a lower temperature, alone and with the best of the others
    return f"trying up to {count} forms of prompt on this model, {rollouts} rollouts each, to see what helps"


def trial(session: "Subject", before: float, reward_before: float | None = None) -> Trial:
    """Sample ``parse_trial`` rollouts in each setup.

    Args:
        session: The run, or what of one is looked at.
        before: Share of the replies that parse now.
        reward_before: Mean reward now; None does not ask the metric.
    """
    demos = list(session.trainset[-DEMOS:]) if len(session.trainset) > DEMOS else []
    speaking = _speaking(session.program)
    shown_to = tuple(name for name, predictor in speaking if _fits(predictor, demos))
    kept = kept_by(session.program)
    current = kept or adapter_in_force()
    reward = Reward(lambda gold, pred, trace=None: 0.0) if reward_before is None else session.rollouter.reward

    def attempt(setup: Setup) -> Attempt:
        return Attempt(setup, tuple(_played(session, reward, setup, demos if setup.demos else [], shown_to)))

    attempts = list(map(attempt, _forms(current, demos=bool(shown_to))))
    if (session.policy.sampling_temperature or 0) > COOLER:
        best = max(attempts, key=lambda found: _rank(found, scored=reward_before is not None))
        attempts.append(attempt(Setup(current, temperature=COOLER)))
        if best.rank < 1:
            attempts.append(attempt(Setup(best.setup.adapter, best.setup.demos, COOLER)))
    names = tuple(name for name, _ in speaking)
    have = any(predictor.demos for _, predictor in speaking)
    teach = any(not lacking(p.signature, example.toDict()) for _, p in speaking for example in session.trainset)
    return Trial(before, tuple(attempts), current, kept is not None, names, shown_to, reward_before, have, teach)


def _forms(current: dspy.Adapter, *, demos: bool) -> Iterator[Setup]:
    others = [form() for form in FORMS if type(current) is not form]
    yield from map(Setup, others)
    if demos:
        yield from (Setup(adapter, demos=True) for adapter in (current, *others))


def _played(
    session: "Subject", reward: Reward, setup: Setup, demos: list[dspy.Example], shown_to: Sequence[str]
) -> list[Rollout]:
    program = with_texts(session.program, session.population.best)
    cooler: dict[int, dspy.BaseLM] = {}  # one for each LM: BestOfN and Refine refuse a program of two
    for name, predictor in _speaking(program):
        if setup.temperature is not None:
            lm = predictor.lm or dspy.settings.lm
            if id(lm) not in cooler:
                cooler[id(lm)] = lm.copy(temperature=setup.temperature)
            predictor.lm = cooler[id(lm)]
        if name in shown_to and demos:
            predictor.demos = [*predictor.demos, *demos]
    keep(program, setup.adapter)
    tried = session.trainset[: min(EXAMPLES, max(1, len(session.trainset) - DEMOS))]
    tasks = [
        Task(Problem(index % len(tried), tried[index % len(tried)]), session.population.best, index // len(tried))
        for index in range(session.config.parse_trial)
    ]
    given = session.rollouter
    rollouter = Rollouter(program, reward, given.settings, session.policy.handle.engine.expect, seed=given.seed)
    with dspy.context(adapter=setup.adapter):  # so that nobody is told that it differs from the setting
        return rollouter.rollout(tasks, f"parse trial {describe(setup.adapter)} {setup}")


def _speaking(program: dspy.Module) -> list[tuple[str, dspy.Predict]]:
    """Predictors that speak with the policy."""
    return [
        (name, predictor)
        for name, predictor in program.named_predictors()
        if is_recorded(predictor.lm or dspy.settings.lm)
    ]


def _fits(predictor: dspy.Predict, demos: Sequence[dspy.Example]) -> bool:
    """Whether the examples can be shown to it: it shows none yet, and they hold an input of its and an output."""
    signature = predictor.signature
    return (
        bool(demos)
        and not predictor.demos
        and all(
            any(name in demo for name in signature.input_fields)
            and any(name in demo for name in signature.output_fields)
            for demo in demos
        )
    )
