"""Claim (e): three worlds one after the other, each compile() going on from the program that the last one returned.

The instruction that every run starts with is the same and names no task. RL carries its weights on, the others also
their population, and the anchor then holds the weights under the instruction that came with them.
"""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.evidence.places import SEQUENCE
from benchmarks.evidence.raw import Result, final, shown
from benchmarks.readme import table

Ends = tuple[list[float], list[float]]


def rows(results: Sequence[Result], world: str = "", base: str = "base") -> str:
    """Accuracy at the end of each stage, beside it the same arm's from the base; its worst stage beside the best."""
    cells = ends(results, base)
    shares = worst_shares(cells)
    body = [[arm, *(_words(*cell) for cell in stages), f"{shares[arm]:.2f}"] for arm, stages in cells.items()]
    head = [f"{stage}: {name}" for stage, name in enumerate(SEQUENCE, start=1)]
    return table(["arm", *head, "worst stage, of the best"], body)


def ends(results: Sequence[Result], base: str = "base") -> dict[str, list[Ends]]:
    """Arm -> stage -> accuracies of the runs that came there in turn, and of those that began there."""
    arms = dict.fromkeys(result["arm"] for result in results if result["carry"])
    return {arm: [_ends(results, arm, stage, base) for stage in range(len(SEQUENCE))] for arm in arms}


def worst_shares(cells: Mapping[str, Sequence[Ends]]) -> dict[str, float]:
    """Arm -> its median over the best that any arm came to, in turn or from the base, in the worst of its stages."""
    best = [
        max(statistics.median(values) for stages in cells.values() for values in stages[stage])
        for stage in range(len(SEQUENCE))
    ]
    return {
        arm: min(statistics.median(come) / (top or 1.0) for (come, _), top in zip(stages, best, strict=True))
        for arm, stages in cells.items()
    }


def _ends(results: Sequence[Result], arm: str, stage: int, base: str) -> Ends:
    of = [result for result in results if result["arm"] == arm and result["world"] == SEQUENCE[stage]]
    fresh = [final(result) for result in of if result["base"] == base]
    return [final(result) for result in of if result["carry"]] if stage else fresh, fresh


def _words(come: Sequence[float], fresh: Sequence[float]) -> str:
    return shown(come) if come is fresh else f"{shown(come)}, fresh {shown(fresh)}"
