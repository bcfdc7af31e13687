"""Evaluations that were made after a run, as frozen records: the lines of its ``evaluations.jsonl``. Pure."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

T = TypeVar("T")

SEEN = {"val": "these problems chose the best candidate", "train": "these problems were trained on"}
"""Split -> why its figures are not an honest test. Nothing is known about other splits: the user made them."""


@dataclass(frozen=True)
class Conditions:
    """The problems and settings of an evaluation; None where they were not written."""

    split: str | None
    limit: int | None
    """Only the first so many problems of the split; None for all."""
    problems_of_split: int | None
    """Problems with rollouts."""
    k: int | None
    """Rollouts for each problem."""
    cycle: int | None
    """The cycle whose end was evaluated; None when the weights were named instead."""
    weights: str | None
    candidate: str | None
    """Digest of the candidate."""
    seed: int | None

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


def two_by_two_of(data: Mapping[str, object]) -> EvaluatedCells | None:
    """The two-by-two of a line; None when the line holds none."""
    cells = data.get("cells")
    if data.get("kind") != "two_by_two" or not isinstance(cells, dict):
        return None
    read = {}
    for name, cell in cells.items():
        row, _, column = name.partition("/")
        if isinstance(cell, list) and len(cell) == 2 and (mean := _number(cell[0])) is not None:
            read[row, column] = (mean, _number(cell[1]))
    return _under(EvaluatedCells, data, cells=read) if read else None


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
