"""Text and weights, text alone, weights alone: two programs of several modules, at equal rollouts in all.

python -m benchmarks.programs    # 3 seeds; what is finished is not made again

Every arm is the same loop under another `method`. RL only and GEPA only are given at least the rollouts that FST spent
on both on the same seed: RL as further updates, GEPA as a longer search. Two more arms are FST that trains a LoRA
adapter for all predictors, or one for each. Figures go to benchmarks/results/programs.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from benchmarks.evidence.run import commit
from benchmarks.readme import program_table, spent
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.evaluation.run_reader import RunReader
from dspy_fst.evaluation.two_by_two_table import estimate, play
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.run.files import read_json, write_json
from programs import reckon, relay
from programs.common import Task
from programs.lab import BASE as LAB
from programs.lab import FeedbackProposer
from programs.lab.pretrain import one_thread
from programs.reckon.proposer import proposer as reckon_proposer
from programs.tiny import RECKON

RESULTS = Path(__file__).parent / "results" / "programs.json"
RUN_LIMIT_S = 1800
PROBLEMS, SAMPLES = 64, 2
"""Held-out problems of a measurement, and rollouts of each."""
MAX_TOKENS = 24
ARMS = ("fst", "gepa", "rl")
SEEDS = range(3)

TASKS: dict[str, Any] = {
    "relay": (relay, LAB, FeedbackProposer),
    "reckon": (reckon, RECKON, reckon_proposer),
}
"""Program -> its module, its base model, and its proposer with a seed."""
ADAPTER, LORA_RATE = {"rank": 16, "alpha": 32.0}, 4e-3
"""Rank and scaling are the defaults; the rate is the one tuned for `lora` by benchmarks.evidence.tune."""
RECIPE: dict[str, Any] = {
    "cycles": 3,
    "steps_per_cycle": 5,
    "problems_per_step": 24,
    "group_size": 8,
    "anchors": 24,
    "search_rollouts": 216,
    "reflection_minibatch": 4,
    "components": "all",
    "learning_rate": 2e-3,  # tuned for FST and for RL by benchmarks.evidence.tune: another world, other seeds
}
"""Of every arm; the sizes are ours, and the paper's everything else."""
WITH_LORA: dict[str, dict[str, Any]] = {
    "fst_lora": {"adapter": ADAPTER, "learning_rate": LORA_RATE},
    "fst_lora_per_predictor": {"adapter": ADAPTER, "adapters": "per_predictor", "learning_rate": LORA_RATE},
}
"""FST that trains one LoRA adapter for all predictors, or one for each, with FST's own steps and rollouts."""


@dataclass(frozen=True)
class Run:
    """Which run: everything that its result depends on."""

    program: str
    arm: str
    seed: int
    rollouts: int | None = None
    """For a baseline: spend at least so many in all."""

    @property
    def recipe(self) -> dict[str, Any]:
        if self.arm in WITH_LORA:
            return {**RECIPE, "method": "fst", **WITH_LORA[self.arm]}
        shared = {**RECIPE, "method": self.arm}
        if self.rollouts is None:
            return shared
        if self.arm == "gepa":  # one long search; scoring the seed on the anchors comes on top of its budget
            return {**shared, "cycles": 1, "search_rollouts": self.rollouts - shared["anchors"]}
        step = shared["problems_per_step"] * shared["group_size"]
        return {**shared, "cycles": 1, "steps_per_cycle": math.ceil(self.rollouts / step)}

    @property
    def name(self) -> str:
        return f"{self.program}-{self.arm}-{self.seed}"


@one_thread()
def make(run: Run, out: Path) -> None:
    """Train, measure before and after, and write ``out/result.json``; a run that was killed goes on."""
    transformers.logging.disable_progress_bar()
    program, base_model, proposer = TASKS[run.program]
    task: Task = program.build(train=384, val=32, test=PROBLEMS, seed=run.seed)
    task.program.set_lm(PolicyLM(base_model, engine="in_process", max_tokens=MAX_TOKENS))
    optimizer = FSTOptimizer(
        metric=task.metric,
        propose=proposer(run.seed),
        run_dir=out / "run",
        seed=run.seed,
        progress=False,
        **run.recipe,
    )
    compiled = optimizer.compile(task.program, trainset=task.trainset, valset=task.valset)
    policy, past = policy_of(compiled), RunReader.of(out / "run")
    rollouter = Rollouter(compiled, Reward(task.metric), RolloutSettings(), policy.handle.engine.expect, seed=run.seed)

    def accuracy(checkpoint: Any, texts: Any) -> float:
        return estimate(play(rollouter, policy, checkpoint, texts, task.testset, SAMPLES), SAMPLES).mean_at_k

    base, seed_texts, texts = past.checkpoint("step-000000"), read_texts(task.program), read_texts(compiled)
    trained = policy.checkpoint
    record = past.record
    result = {
        **asdict(run),
        "commit": commit(),
        "recipe": run.recipe,
        "accuracy of the seed program": accuracy(base, seed_texts),
        "accuracy": accuracy(trained, texts),
        "search rollouts": sum(cycle.rollouts for cycle in record.cycles),
        "training rollouts": sum(step.counts["rollouts"] for step in record.steps),
        "updates": sum(step.update.rows > 0 for step in record.steps),
        "rewards": [step.reward for step in record.steps],
        "texts": dict(texts.texts),
    }
    policy.release()
    write_json(out / "result.json", result)


def made(run: Run, folder: Path) -> dict[str, Any]:
    """The result of a run, made in a process of its own unless it is there.

    Raises:
        SystemExit: it failed; what is finished is kept, and the same command goes on.
    """
    out = folder / run.name
    if not (out / "result.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "benchmarks.programs", "--run", json.dumps(asdict(run)), "--folder", str(folder)]
        one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        with (out / "log.txt").open("w") as log:
            done = subprocess.run(
                words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **one_thread}, timeout=RUN_LIMIT_S
            )
        if done.returncode:
            raise SystemExit(f"{out}: it ended with {done.returncode}; see {out / 'log.txt'}")
    result: dict[str, Any] = read_json(out / "result.json")
    print(f"{run.name}: {result['accuracy of the seed program']:.2f} -> {result['accuracy']:.2f}", flush=True)
    return result


def arms(program: str, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """FST, then the baselines at no fewer rollouts, then FST with LoRA adapters."""
    fst = made(Run(program, "fst", seed), folder)
    yield fst
    for arm in ("gepa", "rl"):
        yield made(Run(program, arm, seed, spent(fst)), folder)
    for arm in WITH_LORA:
        yield made(Run(program, arm, seed), folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", choices=sorted(TASKS), help="instead of all")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "programs")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        run = Run(**json.loads(options.run))
        return make(run, options.folder / run.name)
    kept = read_json(RESULTS) or []
    for program in options.program or list(TASKS):
        results = [result for seed in SEEDS for result in arms(program, seed, options.folder)]
        kept = [run for run in kept if run["program"] != program] + results
        write_json(RESULTS, kept)
    print(program_table(kept))
    return None


if __name__ == "__main__":
    main()
