"""Hardly any reply parses: what would help on this very model? A bounded trial, which changes nothing by itself.

Tried on a few examples are DSPy's other forms of prompt (ChatAdapter, JSONAdapter, XMLAdapter), two labelled examples
as demos, both together, and a lower temperature. What it finds is told with the lines of code that use it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.rollout.adapters import adapter_in_force, describe, keep, kept_by
from dspy_fst.rollout.player import Player, Task
from dspy_fst.rollout.recording import is_recorded
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.texts import with_texts
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
class Trial:
    """What was tried, and what came of it."""

    before: float
    """Share of the first replies that parsed."""
    setups: tuple[Setup, ...]
    shares: tuple[float, ...]
    """Share of the replies that parsed, for each setup."""
    shown_to: tuple[str, ...]
    """Predictors that can be shown labelled examples."""
    rollouts: tuple[Rollout, ...] = field(repr=False)

    def told(self) -> str:
        """A table and what to write, as text."""
        each = len(self.rollouts) // len(self.setups)
        lines = [
            f"of the replies to the first examples {self.before:.0%} parse. Tried on this model, with {each} rollouts "
            f"each ({len(self.rollouts)} in all; nothing of it is used by itself):"
        ]
        ranked = sorted(zip(self.shares, self.setups, strict=True), key=lambda pair: -pair[0])
        lines += [f"  {share:>4.0%}  {setup}" for share, setup in ranked]
        if not self.shown_to:
            lines.append("  demos were not tried: the examples hold no output field of a predictor that does not parse")
        share, best = ranked[0]
        if share <= self.before:
            return "\n".join(
                [*lines, "Nothing of it helps: take an instruct model, or fewer and simpler output fields"]
            )
        return "\n".join([*lines, "For the first of them write, before compile():", *self._code(best)])

    def _code(self, best: Setup) -> Iterator[str]:
        yield f"  dspy.configure(adapter=dspy.{type(best.adapter).__name__}())"
        if best.demos:
            yield f"  demos, trainset = trainset[-{DEMOS}:], trainset[:-{DEMOS}]"
            for name in self.shown_to:
                yield f"  program.{name}.demos = demos".replace("program.self.", "program.")
        if best.temperature is not None:
            yield f"  policy = PolicyLM(..., temperature={best.temperature:g})"


def parse_share(rollouts: Sequence[Rollout]) -> float:
    """Share of the policy's replies that parsed; 1 where none was read."""
    failed = [
        isinstance(said, FailedPrediction)
        for rollout in rollouts
        for predictor, _, said in rollout.trace
        if predictor is not None and is_recorded(getattr(predictor, "lm", None) or dspy.settings.lm)
    ]
    return 1 - sum(failed) / len(failed) if failed else 1.0


def trial(session: Session, first: Sequence[Rollout]) -> Trial:
    """Sample ``parse_trial`` rollouts in each setup. The metric is not asked.

    Args:
        first: The rollouts that hardly parsed.
    """
    demos = list(session.trainset[-DEMOS:]) if len(session.trainset) > DEMOS else []
    shown_to = tuple(name for name, predictor in _speaking(session.program) if _fits(predictor, demos))
    setups = tuple(_setups(session, demos=bool(shown_to)))
    played = [_played(session, setup, demos if setup.demos else [], shown_to) for setup in setups]
    shares = tuple(map(parse_share, played))
    return Trial(parse_share(first), setups, shares, shown_to, tuple(one for of in played for one in of))


def _setups(session: Session, *, demos: bool) -> Iterator[Setup]:
    current = kept_by(session.program) or adapter_in_force()
    others = [kind() for kind in FORMS if type(current) is not kind]
    yield from map(Setup, others)
    if demos:
        yield from (Setup(adapter, demos=True) for adapter in (current, *others))
    if (session.policy.sampling_temperature or 0) > COOLER:
        yield Setup(current, temperature=COOLER)


def _played(session: Session, setup: Setup, demos: list[dspy.Example], shown_to: Sequence[str]) -> list[Rollout]:
    program = with_texts(session.program, session.population.best)
    for name, predictor in _speaking(program):
        if setup.temperature is not None:
            predictor.lm = (predictor.lm or dspy.settings.lm).copy(temperature=setup.temperature)
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
    return [(name, one) for name, one in program.named_predictors() if is_recorded(one.lm or dspy.settings.lm)]


def _fits(predictor: dspy.Predict, demos: Sequence[dspy.Example]) -> bool:
    """Whether the examples can be shown to it: they hold an input of its and an output."""
    signature = predictor.signature
    return bool(demos) and all(
        any(name in demo for name in signature.input_fields) and any(name in demo for name in signature.output_fields)
        for demo in demos
    )
