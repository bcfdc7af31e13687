"""SmolLM2-135M-Instruct with ChatAdapter, in whose form it hardly ever replies: with and without a warm start.

    python -m benchmarks.warm_start --run-dir runs/warm

The same small run of Fast-Slow Training is made twice: as it is, and after a warm start from 64 labels. A run that
learns nothing stops by itself. The share of the replies to held-out sentences that parse, and their accuracy, are
measured for the model as it is, for the weights that the warm start left, and for both results. These replies count as
no rollout. The figures go to benchmarks/results/warm_start.json.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import dspy

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.errors import NothingLearnedError
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_record
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.rollout.rollouter import Task as Rolled
from dspy_fst.run.files import write_json
from dspy_fst.training.parse_trial import parse_share
from dspy_fst.types import WARM_START, Problem
from programs.common import Task
from programs.smollm2 import folder
from programs.smollm2.moods import hint
from programs.smollm2.more_moods import build

RESULTS = Path(__file__).parent / "results" / "warm_start.json"
RECIPE: dict[str, Any] = {
    "cycles": 1,
    "steps_per_cycle": 16,
    "problems_per_step": 8,
    "population_size": 2,
    "group_size": 4,
    "anchors": 8,
    "search_rollouts": 16,
    "learning_rate": 2e-5,
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
        weights = {"base": folder(), "after the warm start": options.run_dir / "warm" / "weights" / WARM_START}
        task = build(options.labels)
        replies = {name: held_out(task, policy(path), options) for name, path in weights.items()}
    write_json(RESULTS, {"labels": options.labels, "replies": replies, "arms": arms})


ARMS: dict[str, dict[str, Any]] = {"warm": {"warm_start": "labels"}, "plain": {}}


def arm(options: argparse.Namespace, name: str, **changes: Any) -> dict[str, Any]:
    """One run: the replies of its result, and what it spent."""
    task, run_dir = build(options.labels), options.run_dir / name
    task.program.set_lm(policy(folder()))
    optimizer = FSTOptimizer(metric=task.metric, propose=hint, run_dir=run_dir, **{**RECIPE, **changes})
    stopped = None
    try:
        compiled = optimizer.compile(task.program, trainset=task.trainset)
        after = held_out(replace(task, program=compiled), policy_of(compiled), options)
    except NothingLearnedError as error:  # no update moved the weights
        stopped, after = str(error).splitlines()[0], held_out(task, policy(folder()), options)
    costs = read_record(run_dir, name).costs
    names = ("rollouts", "tokens", "updates", "warm_tokens", "warm_updates")
    return {"replies": after, "stopped": stopped, "spent": {each: costs.count(each) for each in names}}


def policy(weights: Path) -> PolicyLM:
    return PolicyLM(weights, engine="in_process", max_tokens=MAX_TOKENS)


def held_out(task: Task, lm: PolicyLM, options: argparse.Namespace) -> dict[str, float | None]:
    """How the program replies to held-out sentences with these weights; they are let go of then."""
    task.program.set_lm(lm)
    settings = RolloutSettings(num_threads=RECIPE["num_threads"])
    rollouter = Rollouter(task.program, Reward(task.metric), settings, lm.handle.ready().expect)
    texts = read_texts(task.program)
    problems = [Problem(index, example) for index, example in enumerate(task.testset)]
    tasks = [Rolled(problem, texts, sample) for problem in problems for sample in range(options.samples)]
    try:
        rollouts = rollouter.rollout(tasks, "held out")
    finally:
        lm.release()
    return {"parsed": parse_share(rollouts), "accuracy": fmean(rollout.reward or 0.0 for rollout in rollouts)}


if __name__ == "__main__":
    main()
