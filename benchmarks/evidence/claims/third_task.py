"""What an arm brings to the last of three tasks in a row, and what it comes to there, beside the same from the base.

Weights that no longer follow instructions give a search little to find: its texts start where the seed's would.
"""

from collections.abc import Sequence

from benchmarks.evidence.places import SEQUENCE
from benchmarks.evidence.raw import Result, curve, final, shown
from benchmarks.readme import table

HEAD = ("other instructions before it", "accuracy at its start", "at its end")


def rows(results: Sequence[Result], world: str = "", base: str = "base") -> str:
    """Arms that went through all three."""
    of = [result for result in results if result["world"] == SEQUENCE[-1]]
    arms = dict.fromkeys(result["arm"] for result in of if result["carry"])
    body = [
        [arm, *_cells([r for r in mine if r["carry"]]), *_cells([r for r in mine if r["base"] == base])]
        for arm in arms
        for mine in [[result for result in of if result["arm"] == arm]]
    ]
    return table(["arm", *(f"{words}{start}" for start in ("", ", from the base") for words in HEAD)], body)


def _cells(runs: Sequence[Result]) -> list[str]:
    if not runs:
        return [""] * len(HEAD)
    kept = [run["other instructions"]["base"] for run in runs]
    return [shown(kept), shown([curve(run)[0][1] for run in runs]), shown([final(run) for run in runs])]
