"""Makes the runs on SmolLM2, in processes of their own; what is finished is not made again.

python -m benchmarks.language.grid short    # one task, every arm, one seed
python -m benchmarks.language.grid long     # three tasks, every arm, two seeds
python -m benchmarks.language.grid short --arm rl --world desk    # only these

Runs lie in runs/language; results go to benchmarks/results/evidence/language/FORM.jsonl, one line a run, or, when an
arm or a task is named, to runs/language/FORM.jsonl: those are not published.
"""

import argparse
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.evidence.experiments import Place
from benchmarks.evidence.grid import make_all, stop, write
from benchmarks.evidence.raw import RESULTS
from benchmarks.evidence.run import Run
from benchmarks.language.arms import ARMS, RECIPE
from benchmarks.language.run import LanguageRun
from programs.lab.demo import positive
from programs.language import TASKS

UPDATES = RECIPE["cycles"] * RECIPE["steps_per_cycle"]
PUBLISHED = RESULTS / "language"


@dataclass(frozen=True)
class Form:
    worlds: tuple[str, ...]
    seeds: int


FORMS = {"short": Form(("desk",), 1), "long": Form(tuple(TASKS), 2)}


def planned(worlds: Sequence[str], arms: Sequence[str], seeds: int) -> list[Run]:
    """A run each, measured at the end of each cycle, under the seed instruction at the ends."""
    interval = RECIPE["steps_per_cycle"]
    return [
        LanguageRun(arm, world, seed, interval=interval, seed_interval=UPDATES)
        for seed in range(seeds)
        for world in worlds
        for arm in arms
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=sorted(FORMS))
    parser.add_argument("--arm", action="append", choices=sorted(ARMS), help="only these")
    parser.add_argument("--world", action="append", choices=sorted(TASKS), help="only these tasks")
    parser.add_argument("--processes", type=positive, default=2, help="runs at a time, one thread and 5 GiB each")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "language")
    options = parser.parse_args(arguments)
    form = FORMS[options.form]
    runs = planned(options.world or form.worlds, options.arm or tuple(ARMS), form.seeds)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        results = make_all([runs], Place(options.folder), options.processes, Console())
    except KeyboardInterrupt:
        raise SystemExit("stopped; finished runs are kept, and the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    path = (options.folder if options.arm or options.world else PUBLISHED) / f"{options.form}.jsonl"
    write(results, path)
    print(f"{len(results)} runs are in {path}\npython -m benchmarks.evidence.tables writes BENCHMARKS.md")


if __name__ == "__main__":
    main()
