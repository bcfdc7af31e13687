"""What was evaluated after a run, as frozen records: the lines of its ``evaluations.jsonl``."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")

SEEN = {"val": "these problems chose the best candidate", "train": "these problems were trained on"}
"""Split -> why its figures are no honest test. Other splits are of the user's making, and nothing is known of them."""


@dataclass(frozen=True)
class Conditions:
    """On which problems and under what an evaluation was made; None where it was not written."""

    split: str | None
    limit: int | None
    """Only so many problems of the split, its first ones; None for all."""
    problems_of_split: int | None
    """Problems that were played."""
    k: int | None
    """Rollouts for each."""
    cycle: int | None
    """Whose end was evaluated; None when the weights were named instead."""
    weights: str | None
    candidate: str | None
    """Its digest."""
    seed: int | None

    @property
    def words(self) -> str:
        """All that is known, in one line."""
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
class EvaluatedCells(Conditions):
    """Scores of {instructions} x {weights}; ``weights`` names the trained ones, ``candidate`` the evolved ones."""

    cells: Mapping[tuple[str, str], tuple[float, float | None]]
    """(row, column), e.g. ``("seed", "base")``, -> mean and its standard error."""

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.cells))


@dataclass(frozen=True)
class Evaluated(Conditions):
    """One candidate's evaluation on a split: mean@k and its interval."""

    problems: int | None
    """Problems that were measured; the others' rollouts were all masked."""
    mean: float
    low: float | None
    high: float | None


def as_written(cls: type[T], data: Mapping[str, Any], **made: Any) -> T:
    """An instance from what was written; what another release did not write is None."""
    return cls(**{of.name: data.get(of.name) for of in fields(cls)} | made)  # type: ignore[arg-type]


def evaluations_in(lines: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Every line that is a JSON object; a torn one is left out."""
    for line in lines:
        try:
            data = json.loads(line)
        except ValueError:
            continue
        if isinstance(data, dict):
            yield data


def two_by_two_of(data: Mapping[str, Any]) -> EvaluatedCells | None:
    """The table that a line holds; None where it holds none."""
    cells = data.get("cells")
    if data.get("kind") != "two_by_two" or not isinstance(cells, dict):
        return None
    read = {}
    for name, cell in cells.items():
        row, _, column = name.partition("/")
        if isinstance(cell, list) and len(cell) == 2 and (mean := _number(cell[0])) is not None:
            read[row, column] = (mean, _number(cell[1]))
    return _under(EvaluatedCells, data, cells=read) if read else None


def evaluated_of(data: Mapping[str, Any]) -> Evaluated | None:
    """The evaluation that a line holds; None where it holds none."""
    if data.get("kind") != "eval" or (mean := _number(data.get("mean"))) is None:
        return None
    return _under(Evaluated, data, mean=mean, low=_number(data.get("low")), high=_number(data.get("high")))


def _under(cls: type[T], data: Mapping[str, Any], **made: Any) -> T:
    """An evaluation with its conditions, as far as they are what they should be: other tools may write such lines."""
    texts = [name for name in ("split", "weights", "candidate") if not isinstance(data.get(name), str)]
    counts = ("limit", "problems_of_split", "problems", "k", "cycle", "seed")
    return as_written(
        cls, {**data, **dict.fromkeys(texts), **{name: _count(data.get(name)) for name in counts}}, **made
    )


def _count(value: object) -> int | None:
    """The value when it is a whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    """The value when it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
