"""Makes the runs on SmolLM2, in processes of their own; what is finished is not made again.

python -m benchmarks.language.grid short    # one task, every arm, one seed
python -m benchmarks.language.grid long     # three tasks, every arm, two seeds, more checkpoints
python -m benchmarks.language.grid short --arm rl --world desk    # only these
python -m benchmarks.language.grid long --finished                # make none: publish those that are finished

Runs lie in runs/language/FORM; results go to benchmarks/results/evidence/language/FORM.jsonl, one line a run, or, when
an arm or a task is named, to runs/language/FORM.jsonl: those are not published.
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
    interval: int
    """Updates between two measured checkpoints."""
    seed_interval: int
    """The same, under the seed instruction: where drift is compared it is asked at each."""


FORMS = {
    "short": Form(("desk",), 1, RECIPE["steps_per_cycle"], UPDATES),
    "long": Form(tuple(TASKS), 2, UPDATES // 4, UPDATES // 4),
}


def planned(form: Form, worlds: Sequence[str] = (), arms: Sequence[str] = ()) -> list[Run]:
    """A run each, of all of the form's tasks and arms or of these."""
    return [
        LanguageRun(arm, world, seed, interval=form.interval, seed_interval=form.seed_interval)
        for seed in range(form.seeds)
        for world in worlds or form.worlds
        for arm in arms or ARMS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=sorted(FORMS))
    parser.add_argument("--arm", action="append", choices=sorted(ARMS), help="only these")
    parser.add_argument("--world", action="append", choices=sorted(TASKS), help="only these tasks")
    parser.add_argument("--processes", type=positive, default=2, help="runs at a time, one thread and 5 GiB each")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "language")
    parser.add_argument(
        "--finished", action="store_true", help="make no run: write the lines of those that are finished"
    )
    options = parser.parse_args(arguments)
    runs = planned(FORMS[options.form], options.world or (), options.arm or ())
    place = Place(options.folder / options.form)
    if options.finished:
        runs = [run for run in runs if (place.of(run) / "result.json").exists()]
        if not runs:
            parser.error(f"no run is finished in {place.folder}; without --finished they are made")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        results = make_all([runs], place, options.processes, Console())
    except KeyboardInterrupt:
        raise SystemExit("stopped; finished runs are kept, and the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    path = (options.folder if options.arm or options.world else PUBLISHED) / f"{options.form}.jsonl"
    write(results, path)
    print(f"{len(results)} runs are in {path}\npython -m benchmarks.evidence.tables writes BENCHMARKS.md")


if __name__ == "__main__":
    main()
