"""Hardly any reply parses: what would help on this very model? A bounded trial, which changes nothing by itself.

Tried on a few examples are DSPy's other forms of prompt (ChatAdapter, JSONAdapter, XMLAdapter), two labelled examples
as demos, both together, a lower temperature, and that with the best of the others. What the trial finds is told with
the lines of code that use it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.rollout.adapters import adapter_in_force, code_of, describe, keep, kept_by
from dspy_fst.rollout.player import Player, Task
from dspy_fst.rollout.recording import is_recorded
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.texts import in_python, with_texts
from dspy_fst.session import Session
from dspy_fst.types import Problem, Rollout

FORMS: tuple[type[dspy.Adapter], ...] = (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter)
DEMOS = 2
"""Labelled examples that are shown; they come from the end of the trainset, and are not among those tried (ours)."""
COOLER = 0.5
"""The lower temperature that is tried (ours)."""
EXAMPLES = 8
"""Different examples that are tried at most (ours)."""


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
    def rank(self) -> float:
        """The share; what was not measured stands behind everything that was."""
        return -1.0 if self.share is None else self.share

    def __str__(self) -> str:
        masks = Counter(rollout.mask for rollout in self.rollouts if rollout.mask is not None)
        reasons = f" ({masks.total()} of {len(self.rollouts)} rollouts masked: {'; '.join(sorted(masks))})"
        share = "none read" if self.share is None else f"{self.share:.0%}"
        return f"  {share:>9}  {self.setup}{reasons if masks else ''}"


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

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        return tuple(rollout for attempt in self.attempts for rollout in attempt.rollouts)

    def told(self) -> str:
        """A table and what to write, as text."""
        each = len(self.rollouts) // len(self.attempts)
        lines = [
            f"of the replies to the first examples {self.before:.0%} parse. Tried on this model, with {each} rollouts "
            f"each ({len(self.rollouts)} in all; nothing of it is used by itself):"
        ]
        ranked = sorted(self.attempts, key=lambda attempt: -attempt.rank)
        lines += map(str, ranked)
        if not self.shown_to:
            lines.append("  demos were not tried: the examples hold no output field of a predictor that does not parse")
        if ranked[0].rank <= self.before:
            return "\n".join(
                [*lines, "Nothing of it helps: take an instruct model, or fewer and simpler output fields"]
            )
        code = [f"  {line}" for line in self.code(ranked[0].setup)]
        where = "before compile() or where a project's module makes the program"
        return "\n".join([*lines, f"For the first of them write, {where}:", *code])

    def code(self, setup: Setup) -> Iterator[str]:
        """Lines of Python that have ``program`` ask in this way; they use ``dspy``, ``program`` and ``trainset``."""
        if setup.adapter is not self.current:
            yield from code_of(describe(setup.adapter))
            if self.keeps_adapter:
                yield "from dspy_fst.rollout.adapters import keep"
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


def parse_share(rollouts: Sequence[Rollout]) -> float | None:
    """Share of the policy's replies that parsed; None where no reply was read."""
    failed = [
        isinstance(said, FailedPrediction)
        for rollout in rollouts
        for predictor, _, said in rollout.trace
        if predictor is not None and is_recorded(getattr(predictor, "lm", None) or dspy.settings.lm)
    ]
    return 1 - sum(failed) / len(failed) if failed else None


def trial(session: Session, before: float) -> Trial:
    """Sample ``parse_trial`` rollouts in each setup. The metric is not asked.

    Args:
        before: Share of the first replies that parsed.
    """
    demos = list(session.trainset[-DEMOS:]) if len(session.trainset) > DEMOS else []
    speaking = _speaking(session.program)
    shown_to = tuple(name for name, predictor in speaking if _fits(predictor, demos))
    kept = kept_by(session.program)
    current = kept or adapter_in_force()

    def attempt(setup: Setup) -> Attempt:
        return Attempt(setup, tuple(_played(session, setup, demos if setup.demos else [], shown_to)))

    attempts = list(map(attempt, _forms(current, demos=bool(shown_to))))
    if (session.policy.sampling_temperature or 0) > COOLER:
        best = max(attempts, key=lambda found: found.rank)
        attempts.append(attempt(Setup(current, temperature=COOLER)))
        if best.rank < 1:
            attempts.append(attempt(Setup(best.setup.adapter, best.setup.demos, COOLER)))
    names = tuple(name for name, _ in speaking)
    return Trial(before, tuple(attempts), current, kept is not None, names, shown_to)


def _forms(current: dspy.Adapter, *, demos: bool) -> Iterator[Setup]:
    others = [form() for form in FORMS if type(current) is not form]
    yield from map(Setup, others)
    if demos:
        yield from (Setup(adapter, demos=True) for adapter in (current, *others))


def _played(session: Session, setup: Setup, demos: list[dspy.Example], shown_to: Sequence[str]) -> list[Rollout]:
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
    unasked = Reward(lambda gold, pred, trace=None: 0.0)
    player = Player(program, unasked, session.player.settings, session.policy.handle.engine.expect)
    with dspy.context(adapter=setup.adapter):  # so that nobody is told that it differs from the setting
        return player.play(tasks, f"parse trial {describe(setup.adapter)} {setup}")


def _speaking(program: dspy.Module) -> list[tuple[str, dspy.Predict]]:
    """Predictors that speak with the policy."""
    return [
        (name, predictor)
        for name, predictor in program.named_predictors()
        if is_recorded(predictor.lm or dspy.settings.lm)
    ]


def _fits(predictor: dspy.Predict, demos: Sequence[dspy.Example]) -> bool:
    """Whether the examples can be shown to it: they hold an input of its and an output."""
    signature = predictor.signature
    return bool(demos) and all(
        any(name in demo for name in signature.input_fields) and any(name in demo for name in signature.output_fields)
        for demo in demos
    )
