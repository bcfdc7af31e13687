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
OF_LANGUAGE = {"gepa": "#7f7f7f", "warm": "#ff7f0e", "lora": "#17becf", "self_reflecting": "#8c564b"}
"""Those of the language model beside them."""
LANGUAGE, SMOLLM2 = "language", "smollm2-135m-instruct"
Axis = Callable[[Mapping[str, float]], float]


def _updates(line: Mapping[str, float]) -> float:
    return line["step"]


def _drift(line: Mapping[str, float]) -> float:
    return line["evolved KL per rollout"]


def draw(results: Sequence[Result], world: str, base: str = "base", more: Mapping[str, str] | None = None) -> Figure:
    """Held-out accuracy against updates, against all rollouts, and against the drift that it took.

    A line joins the medians over seeds of an arm's checkpoints; the dots are the runs. `more`: arms and colours beside
    those of every chart.
    """
    colours = {**SHOWN, **(more or {})}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels: tuple[Axes, ...] = tuple(figure.subplots(1, 3, sharey=True))
    across = {"weight updates": _updates, "rollouts, searches included": all_rollouts, "KL from the base, nats": _drift}
    for panel, (label, axis) in zip(panels, across.items(), strict=True):
        for arm, runs in by_arm(results, world, base).items():
            if arm in colours:
                _curve(panel, arm, list(runs.values()), axis, colours[arm])
        panel.set_xlabel(label)
        panel.set_ylim(0, 1)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("held-out accuracy")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _curve(panel: Axes, arm: str, runs: Sequence[Result], axis: Axis, colour: str) -> None:
    checkpoints = list(zip(*(run["lines"] for run in runs), strict=True))
    middle = [
        (statistics.median(map(axis, lines)), statistics.median(line["evolved accuracy"] for line in lines))
        for lines in checkpoints
    ]
    panel.plot(*zip(*middle, strict=True), "o-", color=colour, label=arm.replace("_", " "), markersize=3)
    points = [(axis(line), line["evolved accuracy"]) for lines in checkpoints for line in lines]
    panel.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.35, markersize=4)


def main() -> None:
    """The laboratory's chart, and that of the language model."""
    _save(draw(read("long", "main") or read("short", "main"), "reverse_drop"), "main")
    if results := read(LANGUAGE, "short"):
        _save(draw(results, "desk", SMOLLM2, OF_LANGUAGE), LANGUAGE)


def _save(figure: Figure, name: str) -> None:
    path = RESULTS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"{path} is drawn")


if __name__ == "__main__":
    main()
