"""Fast-Slow Training in miniature: train the lab's program and model together, then show what each half brought.

python -m programs.lab.demo --engine in_process --seeds 3
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.evaluation.two_by_two_table import CELLS, two_by_two
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from dspy_fst.run.files import write_json
from programs.lab import BASE, FeedbackProposer, build

RECIPE: dict[str, Any] = {
    "cycles": 4,
    "steps_per_cycle": 6,
    "anchors": 32,
    "search_rollouts": 240,
    "reflection_minibatch": 4,
    "learning_rate": 5e-4,  # for a million parameters; a billion wants about 1e-6
    "validation_samples": 2,
}
"""The laboratory's settings; everything else is the paper's."""
JOINT = CELLS[3]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    transformers.logging.disable_progress_bar()  # the model loads in milliseconds
    console = Console()
    folder = Path(options.run_dir or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}")
    figures = [run(options.world, options.engine, seed, folder / f"seed-{seed}") for seed in range(options.seeds)]
    summary = summarise(figures)
    write_json(folder / "figures.json", {"world": options.world, "engine": options.engine, **summary})
    show(console, summary, options.seeds)
    console.print(f"The same figures as JSON: {folder / 'figures.json'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["in_process", "vllm"], default="in_process")
    parser.add_argument("--seeds", type=positive, default=3, help="independent runs")
    parser.add_argument("--world", default="reverse_drop", help="a world's name or import path")
    parser.add_argument("--run-dir", help="where the runs are kept; default: a new folder under runs/")
    return parser


def positive(text: str) -> int:
    """A number of 1 or more, from the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def run(world: str, engine: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """One run of the laboratory: compile, evaluate on held-out problems, count what was spent."""
    lab = build(world, seed=seed)
    policy = PolicyLM(BASE, engine=engine, max_tokens=16)  # type: ignore[arg-type]
    lab.program.set_lm(policy)
    optimizer = FSTOptimizer(
        metric=lab.metric, propose=FeedbackProposer(seed=seed), run_dir=run_dir, seed=seed, **RECIPE
    )
    compiled = optimizer.compile(lab.program, trainset=lab.trainset, valset=lab.valset)
    table = two_by_two(lab.program, compiled, lab.testset, lab.metric, k=4, seed=seed)
    policy_of(compiled).release()
    measured = {name: asdict(table)[name] for name in ("cells", "drift")}
    figures = {"seed": seed, **measured, "spent": spent(run_dir), "instruction": instruction(compiled)}
    write_json(run_dir / "figures.json", figures)
    return figures


def instruction(compiled: Any) -> str:
    return str(compiled.population.best.texts["solve"])


def spent(run_dir: Path) -> dict[str, int]:
    """Rollouts, reflections and updates by phase, from the run's events."""
    events = read_events(run_dir)
    cycles = [event["report"] for event in events if event["event"] == "cycle"]
    steps = [event["report"] for event in events if event["event"] == "step"]
    return {
        "fast: rollouts": sum(cycle["rollouts"] for cycle in cycles),
        "fast: repeats": sum(cycle["repeats"] for cycle in cycles),
        "fast: reflections": sum(cycle["reflections"] for cycle in cycles),
        "slow: rollouts": sum(step["counts"].get("rollouts", 0) for step in steps),
        "slow: weight updates": sum(step["update"]["rows"] > 0 for step in steps),
        "sampled tokens": sum(report["sampled_tokens"] for report in (*cycles, *steps)),
    }


def summarise(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the runs with their standard errors, and the margin by which the joint cell is best."""
    scores = {cell: [run["cells"][cell]["mean_at_k"] for run in figures] for cell in CELLS}
    margins = [
        run["cells"][JOINT]["mean_at_k"] - max(run["cells"][cell]["mean_at_k"] for cell in CELLS[:3]) for run in figures
    ]
    return {
        "cells": {cell: mean_and_error(values) for cell, values in scores.items()},
        "best_at_k": {cell: mean_and_error([run["cells"][cell]["best_at_k"] for run in figures]) for cell in CELLS},
        "joint_margin": mean_and_error(margins),
        "drift": {
            f"KL to base under {name}, {per.replace('_', ' ')}": mean_and_error(
                [r["drift"][name][per] for r in figures]
            )
            for name in figures[0]["drift"]
            for per in ("per_token", "per_rollout")
        },
        "spent": {name: mean_and_error([run["spent"][name] for run in figures]) for name in figures[0]["spent"]},
        "runs": list(figures),
    }


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def show(console: Console, summary: dict[str, Any], seeds: int) -> None:
    """Print the tables."""

    def text(figure: dict[str, float | None], form: str = ".3f") -> str:
        error = figure["standard_error"]
        return f"{figure['mean']:{form}}" + ("" if error is None else f" ± {error:{form}}")

    k = summary["runs"][0]["cells"][JOINT]["k"]
    problems = summary["runs"][0]["cells"][JOINT]["problems"]
    table = Table(title=f"mean@{k} on {problems} held-out problems, {seeds} runs, ± standard error")
    table.add_column("")
    table.add_column("base weights", justify="right")
    table.add_column("trained weights", justify="right")
    for name in ("seed", "evolved"):
        row = [text(summary["cells"][f"{weights} weights, {name} instructions"]) for weights in ("base", "trained")]
        table.add_row(f"{name} instructions", *row)
    console.print(table)
    console.print(f"Trained and evolved together beat the best other cell by {text(summary['joint_margin'])}.")
    rest = Table(title="drift (nats) and cost of a run")
    rest.add_column("")
    rest.add_column("mean", justify="right")
    for name, figure in summary["drift"].items():
        rest.add_row(name, text(figure))
    for name, figure in summary["spent"].items():
        rest.add_row(name, text(figure, ",.0f"))
    console.print(rest)
    for run in summary["runs"]:
        console.print(f"evolved instruction, seed {run['seed']}: {json.dumps(run['instruction'])}", markup=False)


if __name__ == "__main__":
    main()
