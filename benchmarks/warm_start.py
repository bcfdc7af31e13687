"""SmolLM2-135M-Instruct with ChatAdapter, in whose form it hardly ever replies: with and without a warm start.

    python -m benchmarks.warm_start --run-dir runs/warm

The same small run of Fast-Slow Training is made twice, at equal rollouts: as it is, and after a warm start from 64
labels. Held-out accuracy is that of the validations of the start and of the end. The share of the replies that parse is
measured on the held-out sentences, under the model as it is and under the weights that the warm start left. The
figures go to benchmarks/results/warm_start.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import dspy

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_record
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.files import write_json
from dspy_fst.training.parse_trial import parse_share
from dspy_fst.types import WARM_START, Problem
from programs.smollm2 import folder
from programs.smollm2.moods import hint
from programs.smollm2.more_moods import build

RESULTS = Path(__file__).parent / "results" / "warm_start.json"
RECIPE: dict[str, Any] = {
    "cycles": 1,
    "steps_per_cycle": 4,
    "problems_per_step": 8,
    "population_size": 2,
    "group_size": 4,
    "anchors": 8,
    "search_rollouts": 16,
    "learning_rate": 1e-5,
    "warmup_steps": 0,
    "parse_trial": 0,
    "num_threads": 16,
    "progress": False,
}
MAX_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a new folder, where both runs are kept")
    parser.add_argument("--labels", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="replies to each held-out sentence")
    options = parser.parse_args()
    with dspy.context(adapter=dspy.ChatAdapter()):
        arms = {name: arm(options, name, **recipe) for name, recipe in ARMS.items()}
        warm = options.run_dir / "warm" / "weights" / WARM_START
        parsed = {"before": share(folder(), options), "after": share(warm, options)}
    write_json(RESULTS, {"labels": options.labels, "parsed": parsed, "arms": arms})


ARMS: dict[str, dict[str, Any]] = {"plain": {}, "warm": {"warm_start": "labels"}}


def arm(options: argparse.Namespace, name: str, **changes: Any) -> dict[str, Any]:
    """One run: held-out accuracy of its start and end, and what it spent."""
    task = build(options.labels)
    task.program.set_lm(PolicyLM(folder(), engine="in_process", max_tokens=MAX_TOKENS))
    began, run_dir = time.monotonic(), options.run_dir / name
    optimizer = FSTOptimizer(metric=task.metric, propose=hint, run_dir=run_dir, **{**RECIPE, **changes})
    compiled = optimizer.compile(task.program, trainset=task.trainset, valset=task.testset)
    policy_of(compiled).release()
    record = read_record(run_dir, name)
    start, end = record.validations[0], record.validations[-1]
    names = ("rollouts", "tokens", "updates", "warm_tokens", "warm_updates")
    return {
        "start": start.score,
        "end": end.score,
        "spent": {each: record.costs.count(each) for each in names},
        "seconds": time.monotonic() - began,
    }


def share(model: Path, options: argparse.Namespace) -> float | None:
    """Share of the replies to the held-out sentences that parse."""
    task = build(options.labels)
    policy = PolicyLM(model, engine="in_process", max_tokens=MAX_TOKENS)
    task.program.set_lm(policy)
    texts, settings = read_texts(task.program), RolloutSettings(num_threads=RECIPE["num_threads"])
    rollouter = Rollouter(task.program, Reward(task.metric), settings, policy.handle.ready().expect)
    problems = [Problem(index, example) for index, example in enumerate(task.testset)]
    tasks = [Task(problem, texts, sample) for problem in problems for sample in range(options.samples)]
    try:
        return parse_share(rollouter.rollout(tasks, "shares"))
    finally:
        policy.release()


if __name__ == "__main__":
    main()
