"""What a run asks of a machine: rollouts that are played together, reflections, updates and publishes, in their order.

Pure: the same recipe, lengths and seed give the same acts, on whatever machine they are simulated.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Literal

from dspy_fst.config import FSTConfig
from dspy_fst.training.plan import Cycle, Plan

ACCEPTED = 0.25
"""Share of a search's proposals that are accepted and scored on all anchors (assumed; a run tells its own)."""
LIVE = 0.6
"""Share of a step's groups whose rewards differ, so that an update reads them (assumed; a run tells its own)."""
Phase = Literal["search", "rollouts", "validation"]


@dataclass(frozen=True)
class Lengths:
    """Tokens of replies as eleven deciles, from the shortest to the longest.

    >>> Lengths.around(100).mean
    100.0
    """

    deciles: tuple[float, ...]

    @classmethod
    def around(cls, mean: float) -> "Lengths":
        """Where only a mean is known: evenly from a fifth of it to nine fifths (assumed)."""
        return cls(tuple(mean * (0.2 + 0.16 * i) for i in range(11)))

    @property
    def mean(self) -> float:
        return fmean((low + high) / 2 for low, high in pairwise(self.deciles))

    def draw(self, chance: random.Random) -> float:
        """One reply's tokens, between two deciles evenly."""
        place, part = divmod(chance.random() * 10, 1)
        low, high = self.deciles[int(place)], self.deciles[int(place) + 1]
        return max(1.0, low + part * (high - low))


@dataclass(frozen=True)
class Texts:
    """The program's texts, as far as time depends on them."""

    replies: Lengths
    """Of one call."""
    prompt: float
    """Tokens of one call's prompt, on average."""
    calls: float = 1.0
    """Of the policy in one rollout, on average, one after the other."""
    accepted: float = ACCEPTED
    live: float = LIVE
    read: float = 1.0
    """Tokens that an update reads for each of those that the formula in `update_tokens` counts."""


@dataclass(frozen=True)
class Play:
    """Rollouts that are made together; each is the tokens of its calls' replies."""

    phase: Phase
    rollouts: tuple[tuple[float, ...], ...]
    prompt: float
    """Tokens of a call's prompt that no other rollout has read on the same engine before."""

    @cached_property
    def totals(self) -> tuple[float, ...]:
        """Tokens of each rollout."""
        return tuple(map(sum, self.rollouts))


@dataclass(frozen=True)
class Reflect:
    """Reflections that are asked for together."""

    count: int


@dataclass(frozen=True)
class Learn:
    """A step's end: an update of so many tokens, the publish of its weights, and its bookkeeping."""

    tokens: float
    state: bool
    """Whether a state is written after it."""


Act = Play | Reflect | Learn


class Acts:
    """Makes the acts of a run.

    Args:
        config: The recipe.
        texts: What the program's calls are like.
        trainset: Problems; None: as many as a cycle asks for.
        valset: Problems; 0 for none.
    """

    def __init__(self, config: FSTConfig, texts: Texts, trainset: int | None = None, valset: int = 0, seed: int = 0):
        self.config, self.texts, self.valset = config, texts, valset
        self.plan = Plan(config, trainset or max(config.lookahead, config.problems_per_step))
        self._chance = random.Random(f"{seed} sizing")

    def start(self) -> list[Act]:
        """The validation of the program as it was handed in."""
        return [self._validation(1)] if self.valset else []

    def end(self) -> list[Act]:
        """The validation of the result, which is left out where the last step was validated."""
        last = self.plan.cycles[-1].steps
        measured = bool(last) and self.plan.validates_after(last[-1])
        return [self._validation(self.config.population_size)] if self.valset and not measured else []

    def cycle(self, cycle: Cycle) -> Iterator[Act]:
        """A search, then its steps."""
        if cycle.search_budget:
            yield from self.search(cycle)
        for step in cycle.steps:
            yield self.step()
            yield Learn(self.update_tokens, state=(step + 1) % self.config.checkpoint_every == 0)
            if self.valset and self.plan.validates_after(step):
                yield self._validation(self.config.population_size)

    def search(self, cycle: Cycle) -> Iterator[Act]:
        """The carried population is scored; proposals are played on minibatches, and accepted ones on all anchors."""
        anchors = len(self.plan.anchors(0))
        yield self.play("search", anchors * (self.config.population_size if cycle.index else 1))
        fresh, due, proposed = 0, 0.0, 0
        batch, most = self.config.reflection_minibatch, max(1, cycle.search_budget // self.config.reflection_minibatch)
        while fresh < cycle.search_budget and proposed < most:
            count = min(self.config.proposals_at_once, most - proposed)
            yield Reflect(count)
            yield self.play("search", count * batch)  # the parents' rollouts are known: they were scored on all anchors
            proposed, fresh, due = proposed + count, fresh + count * batch, due + count * self.texts.accepted
            while due >= 1:
                yield self.play("search", max(1, anchors - batch))
                fresh, due = fresh + anchors - batch, due - 1

    def step(self) -> Play:
        """A step's rollouts. Those of a problem under one candidate have their prompt in common."""
        config = self.config
        alike = 1 if config.method == "distill" else max(1, config.group_size // config.population_size)
        return self.play("rollouts", config.problems_per_step * config.rollouts_per_problem, alike)

    @property
    def update_tokens(self) -> float:
        """Tokens that an update reads: of each live group K prompts and G replies, for each call."""
        config, texts = self.config, self.texts
        group = config.population_size * texts.prompt + config.rollouts_per_problem * texts.replies.mean
        return config.problems_per_step * texts.live * texts.calls * group * texts.read

    def play(self, phase: Phase, rollouts: int, alike: int = 1) -> Play:
        """So many rollouts with lengths that are drawn."""
        made = tuple(
            tuple(self.texts.replies.draw(self._chance) for _ in range(self._calls())) for _ in range(rollouts)
        )
        return Play(phase, made, self.texts.prompt / alike)

    def _calls(self) -> int:
        whole, rest = divmod(self.texts.calls, 1)
        return max(1, int(whole) + (rest > 0 and self._chance.random() < rest))

    def _validation(self, candidates: int) -> Play:
        return self.play("validation", candidates * self.valset * self.config.validation_samples)
