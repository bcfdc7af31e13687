"""Claim (e): three worlds one after the other, each compile() going on from the program that the last one returned.

The instruction that every run starts with is the same and names no task. RL carries its weights on, the others also
their population.
"""

import statistics
from collections.abc import Sequence

from benchmarks.evidence.raw import Result, final, shown
from benchmarks.readme import table

SEQUENCE = ("reverse_drop", "ends_decrement", "descending")


def rows(results: Sequence[Result], world: str = "", base: str = "base") -> str:
    """Accuracy at the end of each stage; beside it the same arm's from the base, and its worst stage beside the best.

    "Of the best": an arm's median over the largest that any arm came to there, carried on or from the base.
    """
    arms = dict.fromkeys(result["arm"] for result in results)
    cells = {(arm, stage): _ends(results, arm, stage, base) for arm in arms for stage in range(len(SEQUENCE))}
    best = [max(_middle(ends) for arm in arms for ends in cells[arm, stage]) for stage in range(len(SEQUENCE))]
    body = []
    for arm in arms:
        shares = [_middle(cells[arm, stage][0]) / (top or 1.0) for stage, top in enumerate(best)]
        body.append([arm, *(_words(*cells[arm, stage]) for stage in range(len(SEQUENCE))), f"{min(shares):.2f}"])
    head = [f"{stage + 1}: {name}" for stage, name in enumerate(SEQUENCE)]
    return table(["arm", *head, "worst stage, of the best"], body)


def _ends(results: Sequence[Result], arm: str, stage: int, base: str) -> tuple[list[float], list[float]]:
    """Accuracies of the runs that came here in turn, and of those that began here (both are the first stage's)."""
    of = [result for result in results if result["arm"] == arm and result["world"] == SEQUENCE[stage]]
    fresh = [final(result) for result in of if result["base"] == base]
    return [final(result) for result in of if result["carry"]] if stage else fresh, fresh


def _middle(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _words(carried: Sequence[float], fresh: Sequence[float]) -> str:
    return shown(carried) if carried is fresh else f"{shown(carried)}, fresh {shown(fresh)}"
