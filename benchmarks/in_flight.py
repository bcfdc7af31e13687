"""How many rollouts should be in flight, and what it saves that a validation joins the rollouts of the next step.

    python -m benchmarks.in_flight --out benchmarks/results/in_flight.json      # in process; --engine vllm for a server

Both on the laboratory's program with models of 1M and 25M parameters, in turns. A step samples 256 rollouts, a
validation 160 (40 problems under 4 candidates). Time is the wall's, and this process's own (a server's is not in it).
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.async_rollouts import in_turn
from benchmarks.throughput import GROUP, MAX_TOKENS, PROBLEMS, larger_model
from dspy_fst import PolicyLM
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Candidate, Problem, Rollout
from programs.lab import BASE, build

DEFAULT = RolloutSettings().num_threads
IN_FLIGHT = (DEFAULT, 2 * DEFAULT, 4 * DEFAULT)
VALIDATED = 40


def measured(model: Path, kind: str, repeats: int) -> dict[str, Any]:
    """What took how much longer than what, by the wall and by this process's own time."""
    lab = build(val=VALIDATED)
    policy = PolicyLM(model, engine=kind, max_tokens=MAX_TOKENS)  # type: ignore[arg-type]
    lab.program.set_lm(policy)
    engine, seed = policy.handle.ready(), read_texts(lab.program)
    members = [Candidate({name: f"{text} ({number})" for name, text in seed.texts.items()}) for number in range(4)]

    def tasks(examples: Sequence[Any], samples: int) -> list[Task]:
        problems = [Problem(i, example) for i, example in enumerate(examples)]
        return [Task(p, member, n) for p in problems for member in members for n in range(samples)]

    step, validation = tasks(lab.trainset[:PROBLEMS], GROUP // len(members)), tasks(lab.valset[:VALIDATED], 1)

    def play(asked: Sequence[Task], draw: str, in_flight: int = DEFAULT) -> list[Rollout]:
        settings = RolloutSettings(num_threads=in_flight)
        return Rollouter(lab.program, Reward(lab.metric), settings, engine.expect).rollout(asked, draw)

    def apart(draw: str) -> list[Rollout]:
        return [*play(validation, draw), *play(step, draw)]

    ways: dict[str, Callable[[str], list[Rollout]]] = {
        **{f"{count} in flight": lambda draw, count=count: play(step, draw, count) for count in IN_FLIGHT},  # type: ignore[misc]
        "validation, then step": apart,
        "validation and step together": lambda draw: play([*validation, *step], draw),
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    different = []
    for turn in range(repeats + 1):  # the first is not counted
        found = {}
        for way in in_turn(list(ways), turn):
            gc.collect()
            wall, own = time.perf_counter(), time.process_time()
            found[way] = ways[way](f"draw {turn}")
            if turn:
                times[way].append((time.perf_counter() - wall, time.process_time() - own))
        together, one_by_one = list(ways)[-1], list(ways)[-2]
        pairs = zip(found[one_by_one][len(validation) :], found[together][len(validation) :], strict=True)
        different.append(sum([c.logprobs for c in a.calls] != [c.logprobs for c in b.calls] for a, b in pairs))
    policy.release()
    fewest, *more = list(ways)[: len(IN_FLIGHT)]
    over = [*((fewest, way) for way in more), (one_by_one, together)]
    return {
        **{f"{a} over {b}": _ratios(times[a], times[b]) for a, b in over},
        "of the step's 256 rollouts, those with other log-probabilities together": statistics.median(different),
    }


def _ratios(ones: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    """Median, least and largest."""
    found = {}
    for place, name in enumerate(("wall", "process")):
        ratios = [one[place] / other[place] for one, other in zip(ones, others, strict=True)]
        found[name] = [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="in_process")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=["1M", "25M"], default=["1M", "25M"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"1M": BASE, "25M": larger_model(Path(folder) / "larger")}
        for size in options.models:
            found[f"{size}, {options.engine}"] = measured(models[size], options.engine, options.repeats)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
