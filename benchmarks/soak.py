"""What a long run leaks: nothing that grows from cycle to cycle.

    python -m benchmarks.soak --cycles 200 --compiles 40

Many short cycles of one run, then many runs one after the other, in this process. After each cycle or run its memory,
open file handles, threads, child processes and the files of its run directory are measured. Slopes are Theil and Sen's
(the median of the slopes of all pairs), after a warm-up of a quarter; a slope beyond its tolerance is a leak.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.durability.small_run import compile_small
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.files import write_json

RESULT = Path(__file__).parent / "results" / "soak.json"
SHORT: dict[str, Any] = {
    "steps_per_cycle": 1,
    "anchors": 2,
    "search_rollouts": 4,
    "reflection_minibatch": 2,
    "problems_per_step": 1,
    "group_size": 2,
    "num_threads": 2,
}
TOLERANCE: dict[str, float] = {
    "memory": 100_000,
    "handles": 0.02,
    "threads": 0.02,
    "processes": 0.02,
    "files": 0.02,
    "bytes": 40_000,
}
"""Growth a cycle that is no leak. Memory: a run keeps its reports (kilobytes), and allocators wander; one copy of the
model is 3,800,000 bytes. Bytes on disk: events and populations, which are meant to grow; so large is one version of the
weights too. The others are counts: one more in fifty cycles."""
BY_DESIGN = {"files": 1.0}
"""What each cycle adds for good: its population's file."""


@dataclass(frozen=True)
class Measure:
    """One look at this process and its run directory."""

    memory: int
    """Resident bytes."""
    handles: int
    threads: int
    processes: int
    """Children at any depth."""
    files: int
    bytes: int
    """Of the run directory; files under two names count once."""

    @classmethod
    def now(cls, run_dir: Path) -> "Measure":
        gc.collect()
        process = psutil.Process()
        facts = [path.stat() for path in run_dir.rglob("*") if path.is_file()]
        return cls(
            memory=process.memory_info().rss,
            handles=process.num_fds(),
            threads=process.num_threads(),
            processes=len(process.children(recursive=True)),
            files=len(facts),
            bytes=sum({fact.st_ino: fact.st_size for fact in facts}.values()),
        )


def cycles_of_one_run(cycles: int) -> list[Measure]:
    """A measure after each cycle of one long run."""
    measures = []
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"

        def listen(event: Mapping[str, Any]) -> None:
            if event.get("phase") == "weight update":  # between two writes, so that each measure sees the same files
                measures.append(Measure.now(run_dir))

        compiled = compile_small(run_dir, cycles=cycles, listeners=[listen], **SHORT)
        policy_of(compiled).release()
    return measures


def runs_in_one_process(runs: int) -> list[Measure]:
    """A measure after each of many runs, each in a directory of its own, which is removed."""
    measures = []
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            policy_of(compile_small(run_dir, cycles=1, seed=seed, **SHORT)).release()
            measures.append(Measure.now(run_dir))
    return measures


def slope(values: Sequence[float]) -> float:
    """Growth from one value to the next, deaf to outliers: the median slope of all pairs (Theil 1950, Sen 1968)."""
    return median((later - earlier) / (j - i) for (i, earlier), (j, later) in combinations(enumerate(values), 2))


def growth(measures: Sequence[Measure]) -> dict[str, float]:
    """Slope of each measured quantity after a warm-up of a quarter."""
    settled = measures[len(measures) // 4 :]
    return {name: slope([getattr(measure, name) for measure in settled]) for name in TOLERANCE}


def leaks(slopes: Mapping[str, float], by_design: Mapping[str, float]) -> list[str]:
    """Names of what grows beyond its tolerance."""
    return [name for name, value in slopes.items() if value - by_design.get(name, 0.0) > TOLERANCE[name]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200, help="of the one long run")
    parser.add_argument("--compiles", type=int, default=40, help="runs one after the other")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    soaks = {
        f"{options.cycles} cycles of one run": (cycles_of_one_run(options.cycles), BY_DESIGN),
        f"{options.compiles} runs in one process": (runs_in_one_process(options.compiles), {}),
    }
    figures = {name: figures_of(measures, by_design) for name, (measures, by_design) in soaks.items()}
    show(figures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, figures)
    found = {name: rows["leaks"] for name, rows in figures.items() if rows["leaks"]}
    print(json.dumps({name: rows["slopes"] for name, rows in figures.items()}))
    if found:
        sys.exit(f"these grow: {found}")


def figures_of(measures: Sequence[Measure], by_design: Mapping[str, float]) -> dict[str, Any]:
    """Slopes, tolerances and both ends of each quantity."""
    slopes = growth(measures)
    return {
        "slopes": slopes,
        "by_design": dict(by_design),
        "tolerance": TOLERANCE,
        "first": measures[len(measures) // 4],
        "last": measures[-1],
        "leaks": leaks(slopes, by_design),
    }


def show(figures: Mapping[str, Any]) -> None:
    for name, rows in figures.items():
        table = Table(title=name)
        for column in ("quantity", "after warm-up", "at the end", "slope", "by design", "tolerance", "flat"):
            table.add_column(column, justify="right" if column not in ("quantity", "flat") else "left")
        for quantity, value in rows["slopes"].items():
            ends = (getattr(rows[end], quantity) for end in ("first", "last"))
            by_design = f"{rows['by_design'].get(quantity, 0):g}"
            flat = "no" if quantity in rows["leaks"] else "yes"
            table.add_row(
                quantity, *(f"{end:,}" for end in ends), f"{value:,.3g}", by_design, f"{TOLERANCE[quantity]:,g}", flat
            )
        Console().print(table)


if __name__ == "__main__":
    main()
