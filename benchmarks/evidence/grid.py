"""Makes the runs of the evidence, in processes of their own; what is finished is not made again.

python -m benchmarks.evidence.grid short               # 3 seeds, the main comparison
python -m benchmarks.evidence.grid long                # every experiment, the main one with 5 seeds
python -m benchmarks.evidence.grid long main worlds    # only these
python -m benchmarks.evidence.grid short --world my_pkg.my_world:WORLD    # the main comparison on a world of your own
python -m benchmarks.evidence.grid short --base my_base                   # or from a base model of your own
python -m benchmarks.evidence.grid short --arm my_arm                     # or of RL and an arm of your own

Runs lie in runs/evidence; results go to benchmarks/results/evidence/FORM/EXPERIMENT.jsonl, one line a run, or, when a
world, a base, an arm or a number of seeds is named, to a file below runs/evidence named after them: those are not
published.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from rich.console import Console

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.experiments import EXPERIMENTS, FORMS, Place, Stages, compared
from benchmarks.evidence.marks import base_mark
from benchmarks.evidence.raw import RESULTS
from benchmarks.evidence.run import INTERVAL, Run
from dspy_fst.run.files import read_json
from programs.lab.demo import positive
from programs.lab.pretrain import Recipe, pretrain


def make_all(stages: Stages, place: Place, processes: int, console: Console) -> list[dict[str, Any]]:
    """Make what is missing and return every result.

    Raises:
        SystemExit: a run failed; the finished ones are kept, and the same command goes on.
    """
    _try_first(stages, place)
    place.folder.mkdir(parents=True, exist_ok=True)
    runs = {place.of(run) for run in chain.from_iterable(stages)}
    done = sum((out / "result.json").exists() for out in runs)
    console.print(f"{len(runs)} runs, {done} of them finished before; {processes} at a time")
    results = []
    for stage in stages:
        if others := [place.of(run) for run in stage if _is_another(run, place.of(run))]:
            raise SystemExit(
                "\n".join(f"{out}: another run lies here; move it away to make this one" for out in others)
            )
        _make_base(stage, place)
        with ThreadPoolExecutor(processes) as pool:
            faults = [fault for fault in pool.map(lambda run: _made(run, place, console), stage) if fault]
        if faults:
            raise SystemExit("\n".join(faults))
        results += [read_json(place.of(run) / "result.json") for run in stage]
    return results


def _try_first(stages: Stages, place: Place) -> None:
    """Try each world, and each base that is there from the start, before anything runs.

    Raises:
        SystemExit: everything that is wrong with them.
    """
    runs = list(chain.from_iterable(stages))
    made_later = {str(place.weaker_base), *(str(place.of(run)) for run in runs)}
    tries = [run.world_mark for run in {run.world: run for run in runs}.values()]
    bases = {run.weights for run in runs if run.base not in made_later}
    tries += [partial(base_mark, folder) for folder in sorted(bases)]
    faults = []
    for attempt in tries:
        try:
            attempt()
        except ValueError as fault:
            faults.append(str(fault))
    if faults:
        raise SystemExit("\n".join(faults))


def _make_base(stage: Sequence[Run], place: Place) -> None:
    """The second base, when a run starts from it: another seed, and stopped earlier."""
    base = place.weaker_base
    if any(run.base == str(base) for run in stage) and not (base / "recipe.json").exists():
        pretrain(Recipe(seed=1, target=0.45), base)


def _is_another(run: Run, out: Path) -> bool:
    """Whether a finished run was of another recipe, world or base than the one asked for."""
    stored = read_json(out / "result.json")
    if stored is None:
        return False
    asked = {**asdict(run), "recipe": run.recipe, "marks": run.marks()}
    # Older results do not say these.
    stored = {"carry": False, "interval": INTERVAL, "seed_interval": INTERVAL, "marks": asked["marks"], **stored}
    stored["base"], asked["base"] = Path(stored["base"]).name, Path(asked["base"]).name
    return any(stored[name] != value for name, value in asked.items())


def _made(run: Run, place: Place, console: Console) -> str | None:
    """Why a run could not be made; None when its result is there."""
    out = place.of(run)
    if (out / "result.json").exists():
        return None
    out.mkdir(exist_ok=True)
    words = [sys.executable, "-m", run.module, run.arm, "--world", run.world, "--seed", str(run.seed)]
    words += ["--base", run.base, "--changes", json.dumps(run.changes), "--out", str(out)]
    words += ["--interval", str(run.interval), "--seed-interval", str(run.seed_interval)]
    words += ["--carry"] if run.carry else []
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    log = out / "log.txt"
    try:
        with log.open("a") as file:
            done = subprocess.run(
                words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **one_thread}, timeout=run.limit_s
            )
    except subprocess.TimeoutExpired:
        return f"{out}: not finished after {run.limit_s} s; see {log}"
    if done.returncode:
        *_, last = ["", *log.read_text().splitlines()]
        return f"{out}: it ended with {done.returncode}: {last.strip()} (see {log})"
    console.print(f"{out.name}: {_summary(read_json(out / 'result.json'))}", markup=False)
    return None


def _summary(result: dict[str, Any]) -> str:
    line = result["lines"][-1]
    return f"accuracy {line['evolved accuracy']:.2f} after {line['updates']} updates"


def write(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a run; paths of this machine are cut to their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".new")
    lines = [json.dumps({**result, "base": Path(result["base"]).name}) for result in results]
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)


def stop(number: int, frame: FrameType | None) -> None:
    """Told to end: so are the runs under way, each of which stops in order."""
    for child in psutil.Process().children():
        child.terminate()
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=sorted(FORMS))
    parser.add_argument("experiment", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; without one all of the form's")
    parser.add_argument("--world", help="the main comparison on this world instead; a name or an import path")
    parser.add_argument("--base", type=Path, help="the main comparison from this model instead: a Hugging Face folder")
    parser.add_argument("--arm", action="append", choices=sorted(ARMS), help="these arms beside RL instead of all")
    parser.add_argument("--seeds", type=positive, help="instead of the form's own number")
    parser.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, help="runs at a time, one thread each"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs") / "evidence")
    options = parser.parse_args(arguments)
    form = FORMS[options.form]
    if unknown := sorted(set(options.experiment) - set(form)):
        parser.error(f"no such experiment: {', '.join(unknown)}; the {options.form} form has {', '.join(form)}")
    changed = {"world": options.world, "base": options.base and str(options.base)}
    changed = {name: value for name, value in changed.items() if value}
    if options.experiment and (changed or options.arm):
        parser.error("--world, --base and --arm are of the main comparison: name no experiment beside them")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        make_form(options, changed)
    except ValueError as fault:
        raise SystemExit(str(fault)) from fault
    except KeyboardInterrupt:
        raise SystemExit("stopped; finished runs are kept, and the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def make_form(options: argparse.Namespace, changed: Mapping[str, Any]) -> None:
    """The runs that the command asks for, and their files."""
    form, place, own = FORMS[options.form], Place(options.folder), [*changed.values(), *(options.arm or ())]
    for name in ["main"] if own else options.experiment or form:
        seeds = range(options.seeds or form[name])
        arms = dict.fromkeys(("rl", *options.arm)) if options.arm else None
        stages = [compared(arms, seeds)] if arms else EXPERIMENTS[name](place, seeds)
        stages = [[replace(run, **changed) for run in stage] for stage in stages]
        results = make_all(stages, place, options.processes, Console())
        published = not own and options.seeds is None
        file = "-".join((name, *(Path(word).name.replace(":", ".") for word in own)))
        path = (RESULTS if published else options.folder) / options.form / f"{file}.jsonl"
        write(results, path)
        after = "writes BENCHMARKS.md" if published else f"{path}  prints their tables"
        print(f"{len(results)} runs are in {path}\npython -m benchmarks.evidence.tables {after}")


if __name__ == "__main__":
    main()
