"""What the paper's tasks share: the shape that `build` returns, disjoint splits, and public data sets by revision."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import dspy

Source = Literal["offline", "public"]
"""Where the problems come from: made by our own code, or the paper's data set from the Hugging Face hub."""

DRAWS_PER_PROBLEM = 100
"""Draws after which a generator is taken to have no new problems."""


@dataclass(frozen=True)
class Task:
    """A program with its metric and its problems, ready to be learnt."""

    program: dspy.Module
    """Has no LM yet."""
    metric: Callable[..., dspy.Prediction]
    """GEPA's: (gold, pred, trace, pred_name, pred_trace) -> Prediction(score, feedback)."""
    trainset: list[dspy.Example]
    """The three sets share no problem."""
    valset: list[dspy.Example]
    testset: list[dspy.Example]


@dataclass(frozen=True)
class PublicSet:
    """A data set on the Hugging Face hub, at one revision."""

    name: str
    """Its name there, e.g. "hover-nlp/hover", or a local folder of the same layout."""
    revision: str
    """A commit, or a branch where the commit is not known; the constant that sets it says which."""
    config: str | None = None
    lines: str | None = None
    """A file of JSON lines, to be read line by line: for rows whose fields change their type from row to row."""

    def shuffled(self, split: str, seed: int) -> Iterator[dict[str, Any]]:
        """Its rows, each once, in an order that depends on the name, the split and the seed alone.

        Raises:
            OSError: it is not there, or cannot be reached.
        """
        rows = self._load(split)
        order = list(range(len(rows)))
        random.Random(f"{self.name}-{split}-{seed}").shuffle(order)
        for index in order:
            yield json.loads(rows[index]["text"]) if self.lines else rows[index]

    def _load(self, split: str) -> Any:
        from datasets import load_dataset  # takes seconds, and offline sets do without
        from huggingface_hub import hf_hub_download

        with reaching(self.name, self.revision):
            if self.lines is None:
                return load_dataset(self.name, self.config, revision=self.revision, split=split)
            file = hf_hub_download(self.name, self.lines, repo_type="dataset", revision=self.revision)
            return load_dataset("text", data_files=file, split="train")


@contextmanager
def reaching(name: str, revision: str) -> Iterator[None]:
    """A block that downloads something from the hub.

    Raises:
        OSError: it cannot be reached, with its name and the way out.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{name} (revision {revision}) cannot be loaded from the Hugging Face hub: {error}; "
            "source='offline' needs no network"
        ) from error


def drawn(draw: Callable[[random.Random], dspy.Example], name: str, sizes: Sequence[int]) -> Iterator[dspy.Example]:
    """Problems from a generator that is seeded by a name, up to a limit that ends a search for new ones."""
    rng = random.Random(name)
    return (draw(rng) for _ in range(DRAWS_PER_PROBLEM * sum(sizes)))


def split(pools: Sequence[Iterator[dspy.Example]], sizes: Sequence[int], key: str) -> list[list[dspy.Example]]:
    """One set from each pool, the next of which skips what the ones before it hold.

    Args:
        pools: May be one iterator several times: then a set goes on where the one before it stopped.
        key: The field that tells problems apart.

    Raises:
        ValueError: a pool has too few different problems.
    """
    seen: set[str] = set()
    return [_take(pool, size, key, seen) for pool, size in zip(pools, sizes, strict=True)]


def _take(pool: Iterator[dspy.Example], size: int, key: str, seen: set[str]) -> list[dspy.Example]:
    taken: list[dspy.Example] = []
    while len(taken) < size:
        example = next(pool, None)
        if example is None:
            raise ValueError(f"a set of {size} problems was asked for, and there are only {len(taken)} different ones")
        if example[key] not in seen:
            seen.add(example[key])
            taken.append(example)
    return taken


def examples(
    rows: Iterable[Mapping[str, Any]], convert: Callable[[Any], dspy.Example | None]
) -> Iterator[dspy.Example]:
    """The rows that the task can use, as examples; `convert` returns None for the others."""
    return (example for row in rows if (example := convert(row)) is not None)


def said(pred: Any, field: str) -> str:
    """What a prediction says in a field, as text; empty when it says nothing."""
    value = getattr(pred, field, None)
    return "" if value is None else str(value).strip()


def judged(fault: str | None) -> dspy.Prediction:
    """Score 1 without a fault, else 0 with the fault as feedback."""
    if fault is None:
        return dspy.Prediction(score=1.0, feedback="Correct.")
    return dspy.Prediction(score=0.0, feedback=f"Wrong. {fault}")
