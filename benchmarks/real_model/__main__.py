"""Fast-Slow Training of a real pretrained model of 135 million parameters, on two cores, within 6 GiB (9 GiB on vLLM).

    python -m benchmarks.real_model                        # all of it
    python -m benchmarks.real_model shares speed --repeats 5
    python -m benchmarks.real_model runs --engine in_process --precision float32

*scores*: the gap between the log-probabilities that an engine records and the trainer's. *shares*: how many of
SmolLM2's replies parse, by adapter and demos, at temperature 1. *runs*: a search and two updates, killed once at a
seeded moment and continued, on each engine and in each precision; in process, in float32, also held against an
undisturbed run bit by bit. *speed*: bfloat16 over float32, in turns; ratios only, as absolute times on a shared machine
mean nothing. Each part replaces its own lines of the results and leaves the others.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.durability.trials import Comparison, Killer
from benchmarks.real_model import scores, shares, speed
from benchmarks.real_model.memory import peak_memory
from benchmarks.real_model.runs import MOODS_RUN, draw_moment, survived
from dspy_fst.run.files import read_json, write_json

RESULT = Path(__file__).parent.parent / "results" / "real_model.json"
ENGINES, PRECISIONS = ("in_process", "vllm"), ("float32", "bfloat16")
PASSAGES = {"search rollout": 2, "step rollout": 16, "update": 1}
"""How often a run of `runs.RECIPE` passes each place at least, for where no undisturbed run counted them; a step that
moves nothing loads nothing."""


def measure_shares(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for every adapter, with and without demos."""
    policy = speed.policy("in_process", "float32")
    lines = []
    for adapter, demos in product(shares.ADAPTERS, (0, 2)):
        lines.append(asdict(shares.share(policy, adapter, demos, options.replies)))
        tell(lines[-1])
    policy.release()
    return lines


def measure_scores(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The gap between each engine and the trainer, in each precision."""
    made = {}
    for engine, precision in product(options.engine, options.precision):
        made[f"{engine}, {precision}"] = asdict(scores.measure(engine, precision))
        tell(made)
    return made


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of rollouts on both engines, and of updates."""
    policy = speed.policy("in_process", "float32")
    rollouts = shares.play(policy, "JSONAdapter", 2, speed.ROLLOUTS, "rows")
    policy.release()
    measured = {f"rollouts/s, {engine}": speed.rollouts(engine, options.repeats) for engine in options.engine}
    measured["updates/s"] = speed.updates(rollouts[:4], options.repeats)
    rows = {name: {"median": median(values), "values": values} for name, values in measured.items()}
    tell(rows)
    return {"cpu": speed.cpu_features(), "bfloat16 over float32": rows}


def measure_runs(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One killed and continued run for every engine and precision."""
    made = {}
    for engine, precision in product(options.engine, options.precision):
        with tempfile.TemporaryDirectory(prefix="real-model-") as folder:
            with peak_memory() as peak:
                run = _one_run(Path(folder), engine, precision, options.seed)
            made[f"{engine}, {precision}"] = {**run, "peak_gib": peak.gib}
        tell(made[f"{engine}, {precision}"])
    return made


def _one_run(folder: Path, engine: Any, precision: Any, seed: int) -> dict[str, Any]:
    arguments = (folder, engine, {"precision": precision}, MOODS_RUN)
    exact = engine == "in_process" and precision == "float32"
    whole = Comparison(*arguments) if exact else None
    moment = draw_moment(whole.counts if whole else PASSAGES, random.Random(f"{seed} {engine} {precision}"))
    return asdict(survived(whole or Killer(*arguments), precision, moment, whole))


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "scores": measure_scores,
    "shares": measure_shares,
    "runs": measure_runs,
    "speed": measure_speed,
}


def tell(line: Any) -> None:
    """Progress, on stderr."""
    print(json.dumps(line), file=sys.stderr, flush=True)


def faults(results: dict[str, Any]) -> Iterator[str]:
    """What a killed and continued run left wrong."""
    for name, run in results.get("runs", {}).items():
        if run["gaps"] or run["unequal"]:
            yield f"{name}: {run['gaps']}, unequal {run['unequal']}"
        if run["died"].startswith("("):
            yield f"{name}: it was not killed: {run['died']}"
        if not run["rewards"][0] > 0:
            yield f"{name}: no reward at the start"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=ENGINES, help="all but the shares")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of runs and scores")
    parser.add_argument("--replies", type=int, default=48, help="for each line of the shares")
    parser.add_argument("--repeats", type=int, default=3, help="of each ratio")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
    results: dict[str, Any] = read_json(options.out) or {}
    for part in options.parts:
        measured = PARTS[part](options)
        results[part] = {**results.get(part, {}), **measured} if part in ("scores", "runs") else measured
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, results)
    print(json.dumps({part: results[part] for part in options.parts}))
    if found := list(faults(results)):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
