"""The fast seat: who searches for texts in GEPA's place, and what it is given.

GEPA is the default and has its own way in (`dspy_fst.fast.evolve`): it starts from the whole population and reflects on
single rollouts. Any other optimizer is a `FastOptimizer`: it is handed a program and returns programs. What surrounds
it is the same for all of them (`dspy_fst.fast.seated_search`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import dspy

ProgramMetric = Callable[..., Any]
"""DSPy's ``(example, prediction, trace=None) -> score``."""


@dataclass(frozen=True)
class Seat:
    """What a fast optimizer works with."""

    program: dspy.Module
    """Under the texts of the best incumbent. To call it, or a copy of it with other instructions or demos, is a rollout
    under the current weights. It is counted, and made once for the same texts, demos, problem and ``rollout_id`` of the
    LM. When the budget is spent, a call ends the search."""
    incumbents: tuple[dspy.Module, ...]
    """The program under each member of the carried population, the best first."""
    examples: list[dspy.Example]
    """The anchors. The program can be called on these alone."""
    metric: ProgramMetric
    """Gives the reward of the rollout that a prediction came from; the user's metric has scored it already."""
    budget: int
    """Rollouts that the search may make."""
    seed: int
    """Of the search's draws; each cycle has another."""
    num_threads: int
    max_bootstrapped_demos: int
    """Demos of a predictor that a candidate may hold, from rollouts; 0: none."""
    max_labeled_demos: int
    """The same, from the examples' labels."""
    reflection_lm: dspy.LM | None
    """The run's frozen LM, for an optimizer that asks one for texts."""


@runtime_checkable
class FastOptimizer(Protocol):
    """Searches for texts in GEPA's place."""

    @property
    def name(self) -> str:
        """What messages and recipes call it, e.g. ``"MIPROv2"``."""

    def search(self, seat: Seat) -> Sequence[dspy.Module]:
        """Programs that it found, the best first: copies of ``seat.program`` with other instructions or demos.

        It runs in a thread of its own. Programs that it called and does not return are considered too.
        """
