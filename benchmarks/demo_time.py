"""Time of the demo's run and of the first import, beside another commit's: ratios of the two, in turns.

    python -m benchmarks.demo_time --before CHECKOUT --repeats 3         # some minutes a repeat
    python -m benchmarks.demo_time --before CHECKOUT --only import       # seconds a repeat

The run is `make demo`'s for one seed, from imports to its table: `programs.lab.demo.run` of the checkout itself, in
process, evaluation included.
Both sides take the seeds 0, 1, ... in turn. The import is ``from dspy_fst import FSTOptimizer, PolicyLM``. Each
measurement is a process of its own with one thread. Processor time is the process's own, so what else runs here counts
less than in wall time. The accuracy shows that both sides learn the same: mean@4 of the trained weights with the
evolved instructions.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

WHAT = ("run", "import")
TARGETS = {"run": 2.0, "import": 4.0}
CASE = "BENCHMARK_CASE"
"""As in `benchmarks.in_checkout`, which another checkout need not have."""


def measure(what: str, seed: int) -> dict[str, Any]:
    """Seconds of one run or import with the package on the path, and what the run reached."""
    if what == "import":
        return timed(_imported)
    with tempfile.TemporaryDirectory() as folder:
        return timed(lambda: _run(seed, Path(folder) / "run"))


def timed(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started, worked = time.perf_counter(), time.process_time()
    found = act()
    return {"processor": time.process_time() - worked, "wall": time.perf_counter() - started, **found}


def _imported() -> dict[str, Any]:
    package = importlib.import_module("dspy_fst")
    _ = package.FSTOptimizer, package.PolicyLM
    return {}


def _run(seed: int, folder: Path) -> dict[str, Any]:
    """Imports are part of it: whoever types `make demo` waits for them, early or late."""
    demo = importlib.import_module("programs.lab.demo")
    figures = demo.run("reverse_drop", "in_process", seed, folder)
    accuracy = figures["cells"]["trained weights, evolved instructions"]["mean_at_k"]
    return {"accuracy": accuracy, "spent": figures["spent"]}


def main(arguments: Sequence[str] | None = None) -> None:
    from rich.console import Console

    from benchmarks.in_checkout import measured
    from dspy_fst.run.files import write_json

    options = _parser().parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    console, root = Console(), Path(__file__).parent.parent
    sides = {"ours": root, "before": options.before.resolve()}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for what in options.only or WHAT:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for seed in range(options.repeats):
            for side, checkout in sides.items():
                figures, _ = measured(__file__, [what, seed], checkout)
                runs[side].append(figures)
                console.print(f"{what}, {side}, seed {seed}: {told(figures)}", markup=False)
        found[what] = runs
        console.print(summary(what, runs), markup=False)
    write_json(options.out, {"ratios": {what: ratios(runs) for what, runs in found.items()}, "runs": found})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the commit to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=WHAT, action="append", help="measure this alone")
    default = Path(__file__).parent / "results" / "demo_time.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser


def told(figures: dict[str, Any]) -> str:
    reached = f", accuracy {figures['accuracy']:.3f}" if "accuracy" in figures else ""
    return f"{figures['processor']:.1f} s of the processor, {figures['wall']:.1f} s{reached}"


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Before over ours, of each pair of neighbours in time."""
    pairs = list(zip(runs["before"], runs["ours"], strict=True))
    return {clock: [before[clock] / ours[clock] for before, ours in pairs] for clock in ("processor", "wall")}


def summary(what: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """The ratios with their spread, and what both sides reached."""
    parts = [
        f"{clock} time {median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        for clock, found in ratios(runs).items()
    ]
    if what == "run":
        reached = {side: mean(each["accuracy"] for each in made) for side, made in runs.items()}
        parts.append(f"accuracy {reached['ours']:.3f} here, {reached['before']:.3f} before")
    return f"{what}, before over ours (target {TARGETS[what]:g}): {'; '.join(parts)}"


if __name__ == "__main__":
    if CASE in os.environ:
        print(json.dumps(measure(*json.loads(os.environ[CASE]))))
        sys.stdout.flush()
    else:
        main()
