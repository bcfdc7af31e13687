"""Evaluations that were made after a run, as frozen records: the lines of its ``evaluations.jsonl``. Pure.

`TwoByTwo` holds both what `evaluation.two_by_two_table.two_by_two` has just measured and what such a line says.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Generic, TypeVar

T = TypeVar("T")
Cell = TypeVar("Cell")
Score = tuple[float, float | None]
"""A mean and its standard error, e.g. ``(0.62, 0.04)``; None where the error was not written."""
INSTRUCTIONS, WEIGHTS = ("seed", "evolved"), ("base", "trained")


def name_of(instructions: str, weights: str) -> str:
    """E.g. ``"trained weights, seed instructions"``."""
    return f"{weights} weights, {instructions} instructions"


CELLS = tuple(name_of(instructions, weights) for instructions, weights in product(INSTRUCTIONS, WEIGHTS))
"""Names of a two-by-two's cells: both weights under the seed instructions, then under the evolved ones."""

SEEN = {"val": "these problems chose the best candidate", "train": "these problems were trained on"}
"""Split -> why its figures are not an honest test. Nothing is known about other splits: the user made them."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The problems and settings of an evaluation; None where they are not known."""

    split: str | None = None
    limit: int | None = None
    """Only the first so many problems of the split; None for all."""
    problems_of_split: int | None = None
    """Problems with rollouts."""
    k: int | None = None
    """Rollouts for each problem."""
    cycle: int | None = None
    """The cycle whose end was evaluated; None when the weights were named instead."""
    weights: str | None = None
    candidate: str | None = None
    """Digest of the candidate."""
    seed: int | None = None

    @property
    def words(self) -> str:
        """Everything that is known, in one line."""
        first = "" if self.limit is None else "the first "
        known = {
            f"split {self.split}": self.split,
            f"{first}{self.problems_of_split} problems": self.problems_of_split,
            f"k={self.k}": self.k,
            f"cycle {self.cycle}": self.cycle,
            f"weights {self.weights}": self.weights,
            f"candidate {self.candidate}": self.candidate,
            f"seed {self.seed}": self.seed,
        }
        return ", ".join(words for words, value in known.items() if value is not None)


@dataclass(frozen=True)
class Drift:
    """How far the trained weights are from the base on held-out prompts, measured on replies that they sampled."""

    per_token: float
    """Mean exact KL(trained || base) of a completion token, in nats, e.g. 0.012."""
    per_rollout: float
    """Mean over rollouts of the KL summed over the rollout's completion tokens, in nats."""


@dataclass(frozen=True)
class TwoByTwo(Conditions, Generic[Cell]):
    """{base, trained weights} x {seed, evolved instructions}, and the drift under both instructions.

    ``weights`` names the trained ones, ``candidate`` the evolved instructions. A cell holds an
    `dspy_fst.evaluation.two_by_two_table.Estimate` where it was measured just now, and a `Score` where it was read.
    """

    cells: Mapping[str, Cell]
    """Keyed by CELLS."""
    drift: Mapping[str, Drift] = field(default_factory=dict)
    """Keyed by ``"seed instructions"`` and ``"evolved instructions"``; empty when every call was greedy."""

    @property
    def rows(self) -> list[str]:
        """Instructions of which a cell is known."""
        return [row for row in INSTRUCTIONS if any(self.at(row, column) is not None for column in WEIGHTS)]

    @property
    def columns(self) -> list[str]:
        """Weights of which a cell is known."""
        return [column for column in WEIGHTS if any(self.at(row, column) is not None for row in INSTRUCTIONS)]

    def at(self, instructions: str, weights: str) -> Cell | None:
        """The cell of e.g. ``("seed", "trained")``; None where it is not known."""
        return self.cells.get(name_of(instructions, weights))

    @property
    def written(self) -> dict[str, Cell]:
        """The cells under the names that JSON has, instructions first: ``"seed/base"``."""
        found = {f"{row}/{column}": self.at(row, column) for row, column in product(INSTRUCTIONS, WEIGHTS)}
        return {name: cell for name, cell in found.items() if cell is not None}


@dataclass(frozen=True, kw_only=True)
class Evaluated(Conditions):
    """One candidate's evaluation on a split: mean@k and its interval."""

    problems: int | None = None
    """Problems that were measured. Of the others every rollout was masked."""
    mean: float
    low: float | None
    high: float | None


def as_written(cls: type[T], data: Mapping[str, object], **converted: object) -> T:
    """An instance of a dataclass from JSON. Fields that another release did not write are None.

    Args:
        converted: Fields whose values differ from the JSON.
    """
    return cls(**{field.name: data.get(field.name) for field in fields(cls)} | converted)  # type: ignore[arg-type]


def evaluations_in(lines: Sequence[str]) -> Iterator[Mapping[str, object]]:
    """Every line that is a JSON object. Torn lines are left out."""
    for line in lines:
        try:
            data = json.loads(line)
        except ValueError:
            continue
        if isinstance(data, dict):
            yield data


def two_by_two_of(data: Mapping[str, object]) -> TwoByTwo[Score] | None:
    """The two-by-two of a line; None when the line holds none."""
    cells = data.get("cells")
    if data.get("kind") != "two_by_two" or not isinstance(cells, dict):
        return None
    read: dict[str, Score] = {}
    for row, column in product(INSTRUCTIONS, WEIGHTS):
        cell = cells.get(f"{row}/{column}")
        if isinstance(cell, list) and len(cell) == 2 and (mean := _number(cell[0])) is not None:
            read[name_of(row, column)] = (mean, _number(cell[1]))
    return _under(TwoByTwo, data, cells=read, drift=_drift_of(data.get("drift"))) if read else None


def _drift_of(data: object) -> dict[str, Drift]:
    """The drift of a line; what is no pair of numbers is left out."""
    if not isinstance(data, Mapping):
        return {}
    pairs = {
        name: (_number(moved.get("per_token")), _number(moved.get("per_rollout")))
        for name, moved in data.items()
        if isinstance(moved, Mapping)
    }
    return {
        name: Drift(token, rollout)
        for name, (token, rollout) in pairs.items()
        if token is not None and rollout is not None
    }


def evaluated_of(data: Mapping[str, object]) -> Evaluated | None:
    """The evaluation of a line; None when the line holds none."""
    if data.get("kind") != "eval" or (mean := _number(data.get("mean"))) is None:
        return None
    return _under(Evaluated, data, mean=mean, low=_number(data.get("low")), high=_number(data.get("high")))


def _under(cls: type[T], data: Mapping[str, object], **converted: object) -> T:
    """An evaluation with its conditions. Conditions of the wrong type become None: other tools may write such lines."""
    texts = [name for name in ("split", "weights", "candidate") if not isinstance(data.get(name), str)]
    counts = ("limit", "problems_of_split", "problems", "k", "cycle", "seed")
    return as_written(
        cls, {**data, **dict.fromkeys(texts), **{name: _count(data.get(name)) for name in counts}}, **converted
    )


def _count(value: object) -> int | None:
    """The value if it is an integer, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
