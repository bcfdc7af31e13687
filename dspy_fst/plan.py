"""Which problems a step sees and what a run will spend: functions of the recipe and the seed alone."""

import random
from dataclasses import dataclass

from dspy_fst.config import FSTConfig


@dataclass(frozen=True)
class Cycle:
    """One alternation: a search of that many fresh rollouts (0: none), then the updates of these steps."""

    index: int
    search_budget: int
    steps: range


@dataclass(frozen=True)
class Budget:
    """The most that a run spends; every figure counts the whole run."""

    searches: int
    search_rollouts: int
    """Fresh rollouts of the searches; the last accepted candidate of each may add one pass over its anchors."""
    scoring_rollouts: int
    """Rollouts that score the carried populations before each search."""
    training_rollouts: int
    validation_rollouts: int
    updates: int


class Plan:
    """The schedule of a run over ``size`` training problems."""

    def __init__(self, config: FSTConfig, size: int):
        self.config, self.size = config, size
        self.cycles = _schedule(config)
        self._orders: dict[int, list[int]] = {}

    def problems(self, step: int) -> list[int]:
        """Problems of a step's batch: a walk through one seeded shuffle of the trainset per epoch."""
        start = step * self.config.problems_per_step
        return [self._at(position) for position in range(start, start + self.config.problems_per_step)]

    def lookahead(self, cycle: int) -> list[int]:
        """D_c: the problems of the cycle's steps, without repetition (paper, section 3)."""
        first = cycle * self.config.steps_per_cycle
        steps = range(first, first + self.config.steps_per_cycle)
        return list(dict.fromkeys(problem for step in steps for problem in self.problems(step)))

    def anchors(self, cycle: int) -> list[int]:
        """A_c: the part of D_c that scores candidates and feeds reflections."""
        lookahead = self.lookahead(cycle)
        random.Random(f"{self.config.seed} anchors {cycle}").shuffle(lookahead)
        return lookahead[: self.config.anchor_count]

    def budget(self, validation_size: int) -> Budget:
        """What the run will spend; rollouts are runs of the whole program."""
        config = self.config
        searches = [cycle for cycle in self.cycles if cycle.search_budget]
        updates = sum(len(cycle.steps) for cycle in self.cycles)
        anchors = min(config.anchor_count, self.size)
        # The first search starts from one text; later ones from up to K.
        carried = sum(config.population_size if cycle.index else 1 for cycle in searches)
        return Budget(
            searches=len(searches),
            search_rollouts=sum(cycle.search_budget for cycle in searches),
            scoring_rollouts=carried * anchors,
            training_rollouts=updates * config.problems_per_step * config.group_size,
            validation_rollouts=validation_size * config.validation_samples * config.population_size,
            updates=updates,
        )

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if epoch not in self._orders:
            order = list(range(self.size))
            random.Random(f"{self.config.seed} epoch {epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch][offset]


def _schedule(config: FSTConfig) -> tuple[Cycle, ...]:
    """The cycles of each method. Baselines spend what Fast-Slow Training spends, at other times."""
    budget, steps, cycles = config.search_budget, config.steps_per_cycle, config.cycles
    whole = budget * cycles
    at = [range(index * steps, (index + 1) * steps) for index in range(cycles)]
    end = cycles * steps
    match config.method:
        case "fst":
            return tuple(Cycle(i, budget, at[i]) for i in range(cycles))
        case "rl":
            return tuple(Cycle(i, 0, at[i]) for i in range(cycles))
        case "gepa":
            return (Cycle(0, whole, range(0)),)
        case "gepa_then_rl":
            return tuple(Cycle(i, whole if i == 0 else 0, at[i]) for i in range(cycles))
        case "rl_then_gepa":
            return (*(Cycle(i, 0, at[i]) for i in range(cycles)), Cycle(cycles, whole, range(end, end)))
