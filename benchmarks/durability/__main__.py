"""What a killed run loses: the act in hand, and nothing else.

    python -m benchmarks.durability --kills 20 --seed 0
    python -m benchmarks.durability --engine vllm --kills 4

A small run is made once undisturbed. Then, for every seeded moment, it is made again in a process that dies there by
SIGKILL (some die a second time while they go on), continued by the same call, and compared with the undisturbed one:
events, populations, weights, the state to go on from and the names of all files. On the in-process engine every bit
must be equal; on vLLM, whose batches are cut by a clock, everything but what was sampled.

A process dies from inside, at the n-th passage of a place (a file written, renamed or removed, a rollout, a reflection,
an update, a load), or from outside by the clock. Linux only: a file is recognised by its descriptor in /proc.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.durability.small_run import ENGINE_OPTIONS
from benchmarks.durability.trials import Comparison, Trial, plan_deaths
from dspy_fst.run.files import read_json, write_json

RESULT = Path(__file__).parent.parent / "results" / "durability.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--engine", choices=sorted(ENGINE_OPTIONS), default="in_process")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="durability-"))
    killer = Comparison(folder, options.engine)
    console, trials = Console(stderr=True), []
    for index, deaths in enumerate(plan_deaths(killer, options.kills, random.Random(options.seed))):
        trials.append(killer.trial(f"trial-{index}", *deaths))
        console.print(str(trials[-1]), markup=False, highlight=False)
    show(trials)
    figures = figures_of(trials, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {**(read_json(options.out) or {}), options.engine: figures})
    print(json.dumps({name: value for name, value in figures.items() if name != "trials"}))
    if figures["equal"] < figures["trials_made"]:
        sys.exit(f"unequal runs were kept in {folder}")
    shutil.rmtree(folder)


def figures_of(trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """The counts, and every trial."""
    deaths = [death for trial in trials for death in trial.deaths]
    return {
        "seed": seed,
        "trials_made": len(trials),
        "equal": sum(not trial.unequal for trial in trials),
        "deaths": sum(not death.startswith("(") for death in deaths),
        "most_acts_paid_twice": max(trial.acts_twice for trial in trials),
        "trials": list(trials),
    }


def show(trials: Sequence[Trial]) -> None:
    table = Table(title="killed, continued, compared with the undisturbed run")
    for column in ("killed", "went on from", "rollouts paid twice", "reflections paid twice", "equal"):
        table.add_column(column)
    for trial in trials:
        table.add_row(
            "\n".join(trial.deaths),
            "\n".join(trial.resumed_from),
            str(trial.rollouts_twice),
            str(trial.reflections_twice),
            f"no: {', '.join(trial.unequal)}" if trial.unequal else "yes",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
