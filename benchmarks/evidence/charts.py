"""Draws the README's charts from the raw lines that the tables are made of.

python -m benchmarks.evidence.charts
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.raw import RESULTS, Result, all_rollouts, by_arm, read

matplotlib.rcParams["svg.hashsalt"] = "dspy_fst"  # so that the same lines give the same file
SHOWN = {"fst": "#1f77b4", "rl": "#d62728", "gepa_long": "#7f7f7f", "gepa_then_rl": "#2ca02c", "anchored": "#9467bd"}
"""Arms of the charts and their colours."""
CHART = RESULTS / "main.svg"
Axis = Callable[[Mapping[str, float]], float]


def _updates(line: Mapping[str, float]) -> float:
    return line["step"]


def _drift(line: Mapping[str, float]) -> float:
    return line["evolved KL per rollout"]


def draw(results: Sequence[Result], world: str) -> Figure:
    """Held-out accuracy against updates, against all rollouts, and against the drift that it took.

    A line joins the medians over seeds of an arm's checkpoints; the dots are the runs.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels: tuple[Axes, ...] = tuple(figure.subplots(1, 3, sharey=True))
    across = {"weight updates": _updates, "rollouts, searches included": all_rollouts, "KL from the base, nats": _drift}
    for panel, (label, axis) in zip(panels, across.items(), strict=True):
        for arm, runs in by_arm(results, world).items():
            if arm in SHOWN:
                _curve(panel, arm, list(runs.values()), axis)
        panel.set_xlabel(label)
        panel.set_ylim(0, 1)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("held-out accuracy")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _curve(panel: Axes, arm: str, runs: Sequence[Result], axis: Axis) -> None:
    checkpoints = list(zip(*(run["lines"] for run in runs), strict=True))
    middle = [
        (statistics.median(map(axis, lines)), statistics.median(line["evolved accuracy"] for line in lines))
        for lines in checkpoints
    ]
    panel.plot(*zip(*middle, strict=True), "o-", color=SHOWN[arm], label=arm.replace("_", " "), markersize=3)
    points = [(axis(line), line["evolved accuracy"]) for lines in checkpoints for line in lines]
    panel.plot(*zip(*points, strict=True), ".", color=SHOWN[arm], alpha=0.35, markersize=4)


def main() -> None:
    results = read("long", "main") or read("short", "main")
    draw(results, "reverse_drop").savefig(CHART, metadata={"Date": None})
    print(f"{CHART} is drawn")


if __name__ == "__main__":
    main()
