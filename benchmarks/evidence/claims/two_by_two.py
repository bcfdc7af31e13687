"""Claim (g): what the weights and the instructions bring, alone and together."""

from collections.abc import Sequence

from benchmarks.evidence.raw import Result, by_arm, shown
from benchmarks.readme import table

CELLS = [f"{weights} weights, {text} instructions" for weights in ("base", "trained") for text in ("seed", "evolved")]


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    return table(
        ["arm", *CELLS],
        [
            [arm, *(shown([run["cells"][cell] for run in runs.values()]) for cell in CELLS)]
            for arm, runs in arms.items()
        ],
    )
