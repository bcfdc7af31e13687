"""Every run of the evidence, in processes of their own; what is finished is not made again.

python -m benchmarks.evidence.grid short            # 3 seeds, the main comparison
python -m benchmarks.evidence.grid long             # 5 seeds, all arms and worlds
python -m benchmarks.evidence.grid short --world my_pkg.my_world:WORLD

Runs lie in runs/evidence; results go to benchmarks/results/evidence-short.jsonl, one line a run.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.evidence.run import Run
from dspy_fst.run.files import read_json
from programs.lab import BASE

RESULTS = Path(__file__).parent.parent / "results"
TUNED = RESULTS / "evidence-tuned.json"
RUN_LIMIT_S = 3600
MAIN = ("fst", "rl", "gepa", "gepa_then_rl", "rl_then_gepa")
VARIANTS = ("one_prompt", "own_baselines", "anchored", "front_loaded", "restarting")
SECOND_TASK = "descending"
CARRIED = ("fst", "rl", "gepa_then_rl", "anchored")
"""Arms from whose weights a second task is learnt by RL."""


@dataclass(frozen=True)
class Form:
    """How much of the evidence is made."""

    worlds: tuple[str, ...]
    seeds: range
    arms: tuple[str, ...]
    second_task: bool


FORMS = {
    "short": Form(("reverse_drop",), range(3), (*MAIN, "anchored"), second_task=False),
    "long": Form(("reverse_drop", "ends_decrement"), range(5), (*MAIN, *VARIANTS), second_task=True),
}


def runs(form: Form, folder: Path) -> Iterator[list[Run]]:
    """The runs, in stages: a stage needs what the ones before it left."""
    yield [
        Run(arm, world, seed, changes=tuned(arm)) for seed in form.seeds for world in form.worlds for arm in form.arms
    ]
    if form.second_task:
        first = form.worlds[0]
        yield [
            Run("rl", SECOND_TASK, seed, base, tuned("rl"))
            for seed in form.seeds
            for base in (str(BASE), *(str(place(folder, Run(arm, first, seed))) for arm in CARRIED))
        ]


def tuned(arm: str) -> dict[str, Any]:
    """The arm's own learning rate, chosen on other seeds; see `benchmarks.evidence.tune`."""
    found = read_json(TUNED)
    return {"learning_rate": found[arm]["learning_rate"]} if found and arm in found else {}


def place(folder: Path, run: Run) -> Path:
    """Where a run lies."""
    world = run.world.rpartition(".")[2].replace(":", "-")
    start = "" if run.base == str(BASE) else f"-after-{Path(run.base).name}"
    return folder / f"{run.arm}-{world}-{run.seed}{start}"


def make_all(stages: Iterator[list[Run]], folder: Path, processes: int, console: Console) -> list[dict[str, Any]]:
    """Make what is missing and return every result.

    Raises:
        SystemExit: a run failed; the finished ones are kept, and the same command goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for stage in stages:
        with ThreadPoolExecutor(processes) as pool:
            faults = [fault for fault in pool.map(lambda run: _made(run, folder, console), stage) if fault]
        if faults:
            raise SystemExit("\n".join(faults))
        results += [read_json(place(folder, run) / "result.json") for run in stage]
    return results


def _made(run: Run, folder: Path, console: Console) -> str | None:
    """Why a run could not be made; None when its result is there."""
    out = place(folder, run)
    if (out / "result.json").exists():
        return None
    out.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "benchmarks.evidence.run", run.arm, "--world", run.world, "--seed", str(run.seed)]
    words += ["--base", run.base, "--changes", json.dumps(run.changes or {}), "--out", str(out)]
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    log = out / "log.txt"
    try:
        with log.open("w") as file:
            done = subprocess.run(
                words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **one_thread}, timeout=RUN_LIMIT_S
            )
    except subprocess.TimeoutExpired:
        return f"{out}: not finished after {RUN_LIMIT_S} s; see {log}"
    if done.returncode:
        return f"{out}: it ended with {done.returncode}; see {log}"
    console.print(f"{out.name}: {_summary(read_json(out / 'result.json'))}", markup=False)
    return None


def _summary(result: dict[str, Any]) -> str:
    last = result["lines"][-1]
    return f"accuracy {last['evolved accuracy']:.2f} after {last['updates']} updates"


def write(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a run; paths of this machine are cut to their names."""
    partial = path.with_name(path.name + ".new")
    lines = [json.dumps({**result, "base": Path(result["base"]).name}) for result in results]
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=sorted(FORMS))
    parser.add_argument("--world", action="append", help="instead of the form's own; a name or an import path")
    parser.add_argument("--seeds", type=int, help="instead of the form's own number")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "evidence")
    options = parser.parse_args(arguments)
    form = FORMS[options.form]
    own = bool(options.world or options.seeds)
    form = Form(
        tuple(options.world or form.worlds),
        range(options.seeds) if options.seeds else form.seeds,
        form.arms,
        form.second_task,
    )
    results = make_all(runs(form, options.folder), options.folder, options.processes, Console())
    path = (options.folder if own else RESULTS) / f"evidence-{options.form}.jsonl"
    write(results, path)
    print(f"{len(results)} runs are in {path}; python -m benchmarks.evidence.tables writes BENCHMARKS.md from them")


if __name__ == "__main__":
    main()
