"""Chooses each arm's learning rate by one rule, on a world and seeds that no table reports.

python -m benchmarks.evidence.tune
python -m benchmarks.evidence.tune --arm lora    # only this arm; the published lines of the others stay

The rule: the highest mean accuracy over the measured checkpoints, averaged over the seeds, under the instruction that
the arm is to be used with. An arm that is compared at another's best rate is no baseline. Every arm that trains is
tuned (`arms.TUNED`), but for those that are to have the rate of another one (`arms.tuned_as`). What is written is what
the published runs are held to.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.evidence.arms import ARMS, TUNED, used_under
from benchmarks.evidence.claims.sensitivity import over_the_run
from benchmarks.evidence.experiments import RATES, Place
from benchmarks.evidence.grid import make_all, write
from benchmarks.evidence.raw import RESULTS
from benchmarks.evidence.run import Run
from dspy_fst.run.files import write_json
from programs.lab.demo import positive

LINES = RESULTS / "tune.jsonl"
TRIED = (5e-4, 1e-3, 2e-3, 4e-3)
TRIED_WITH_LORA = (2e-3, 4e-3, 8e-3, 1.6e-2)
"""A LoRA adapter wants a larger rate than all weights do. Both lists go past the best rate of each arm."""
WORLD, SEEDS = "reverse", (100, 101)


def tried(arm: str) -> tuple[float, ...]:
    """The rates that are tried for an arm."""
    return TRIED_WITH_LORA if "adapter" in ARMS[arm] else TRIED


def chosen(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arm -> its rate, and what each rate came to."""
    table: dict[str, dict[str, float]] = {}
    for arm in TUNED:
        for rate in tried(arm):
            of = [r for r in results if r["arm"] == arm and r["recipe"]["learning_rate"] == rate]
            table.setdefault(arm, {})[str(rate)] = statistics.fmean(over_the_run(r, used_under(arm)) for r in of)
    return {arm: {"learning_rate": float(max(row, key=row.__getitem__)), "tried": row} for arm, row in table.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", choices=TUNED, help="only these; without one all")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "evidence-tune")
    options = parser.parse_args(arguments)
    arms = options.arm or TUNED
    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if options.arm else []
    results = [line for line in lines if line["arm"] not in arms]
    for rate in sorted({rate for arm in arms for rate in tried(arm)}):
        of = [arm for arm in arms if rate in tried(arm)]
        stage = [Run(arm, WORLD, seed, changes={"learning_rate": rate}) for arm in of for seed in SEEDS]
        results += make_all([stage], Place(options.folder / str(rate)), options.processes, Console())
    write(results, LINES)
    write_json(RATES, chosen(results))
    print(f"the chosen rates are in {RATES}, what they were chosen from is in {LINES}")


if __name__ == "__main__":
    main()
