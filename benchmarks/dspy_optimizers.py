"""DSPy's optimizers of weights on our trainer and engines, in the laboratory; and BetterTogether beside FST alone.

    python -m benchmarks.dspy_optimizers --run-dir runs/dspy-optimizers            # three seeds, in process
    python -m benchmarks.dspy_optimizers --run-dir runs/served --engine vllm --seeds 0

GRPO, FST alone and BetterTogether learn from the same number of rollouts; BootstrapFinetune alone has one round.
`w -> fst` is `dspy.BetterTogether`: BootstrapFinetune learns the good ones of one rollout of each problem, and
FSTOptimizer goes on from there with as many updates fewer. BetterTogether spends more than the others: it runs the
student and the program after each of its two steps on a valset of 32, and FSTOptimizer measures on that valset too.
These rollouts are in its count. Accuracy is measured on held-out problems before and after, and counts as no rollout.
The figures go to benchmarks/results/dspy_optimizers.json; a trial with --steps only prints them.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt.grpo import GRPO

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine.making import EngineKind
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_record
from dspy_fst.run.files import read_json, write_json
from programs.lab import BASE, FeedbackProposer, Lab, build

RESULTS = Path(__file__).parent / "results" / "dspy_optimizers.json"
WORLD, TRAIN, VAL, TEST = "reverse", 128, 32, 96
SAMPLES = 2
"""Replies to each held-out problem."""
PROBLEMS, GROUP, STEPS, SEARCH = 8, 4, 16, 96
"""Of an update: problems, and replies to each; updates of FST alone; rollouts of its search."""
TRADED = TRAIN // (PROBLEMS * GROUP)
"""Updates whose rollouts BootstrapFinetune spends instead."""
RATE, SFT_RATE = 1e-3, 1e-3
THREADS = 16


@dataclass
class Setting:
    """What an arm works with."""

    lab: Lab
    lm: PolicyLM
    seed: int
    folder: Path
    updates: int = STEPS
    """Of FST alone; the other arms make as many more or fewer as their rollouts allow."""

    def score(self, gold: Any, pred: Any, trace: Any = None) -> float:
        """The metric as DSPy's own optimizers read it."""
        return float(self.lab.metric(gold, pred).score)

    def accuracy(self, program: dspy.Module) -> float:
        evaluate = dspy.Evaluate(
            devset=self.lab.testset * SAMPLES, metric=self.score, num_threads=THREADS, max_errors=10**6
        )
        return float(evaluate(program).score) / 100

    def bootstrap(self) -> dspy.BootstrapFinetune:
        how = {"folder": self.folder / "w", "learning_rate": SFT_RATE, "seed": self.seed}
        return dspy.BootstrapFinetune(metric=self.score, num_threads=THREADS, train_kwargs=how)

    def fst(self, updates: int) -> FSTOptimizer:
        return FSTOptimizer(
            metric=self.lab.metric,
            propose=FeedbackProposer(seed=self.seed),
            run_dir=self.folder / "fst",
            seed=self.seed,
            num_threads=THREADS,
            cycles=1,
            steps_per_cycle=updates,
            problems_per_step=PROBLEMS,
            group_size=GROUP,
            population_size=2,
            anchors=16,
            search_rollouts=SEARCH,
            learning_rate=RATE,
            warmup_steps=0,
            parse_trial=0,
            progress=False,
        )

    def spent_by_fst(self) -> dict[str, int]:
        """Validation included, which only BetterTogether asks for."""
        costs = read_record(self.folder / "fst", "fst").costs
        return {"rollouts": costs.rollouts + costs.validation_rollouts, "updates": costs.updates}


def bootstrap_finetune(at: Setting) -> tuple[dspy.Module, dict[str, int]]:
    compiled = at.bootstrap().compile(at.lab.program, trainset=at.lab.trainset)
    return compiled, {"rollouts": TRAIN, "updates": read_json(at.folder / "w" / "sft-000001" / "job.json")["updates"]}


def grpo(at: Setting) -> tuple[dspy.Module, dict[str, int]]:
    steps = at.updates + SEARCH // (PROBLEMS * GROUP)
    optimizer = GRPO(
        metric=at.score,
        adapter=dspy.ChatAdapter(),
        exclude_demos=True,
        num_threads=THREADS,
        num_train_steps=steps,
        seed=at.seed,
        num_dspy_examples_per_grpo_step=PROBLEMS,
        num_rollouts_per_grpo_step=GROUP,
        train_kwargs={"folder": at.folder, "learning_rate": RATE, "warmup_steps": 0, "seed": at.seed},
    )
    compiled = optimizer.compile(at.lab.program, trainset=at.lab.trainset)
    job = read_json(at.folder / "grpo-000001" / "job.json")
    told = {name: count for name, count in job.items() if name == "rows" or name.startswith(("found", "left out"))}
    return compiled, {"rollouts": steps * PROBLEMS * GROUP, "updates": job["updates"], **told}


def fst_alone(at: Setting) -> tuple[dspy.Module, dict[str, int]]:
    compiled = at.fst(at.updates).compile(at.lab.program, trainset=at.lab.trainset)
    return compiled, at.spent_by_fst()


def better_together(at: Setting) -> tuple[dspy.Module, dict[str, int]]:
    """Its last program, as every other arm's; BetterTogether returns the one that its valset likes best."""
    together = dspy.BetterTogether(metric=at.score, w=at.bootstrap(), fst=at.fst(at.updates - TRADED))
    compiled = together.compile(
        at.lab.program, trainset=at.lab.trainset, valset=at.lab.valset, strategy="w -> fst", num_threads=THREADS
    )
    if compiled.flag_compilation_error_occurred:
        raise RuntimeError("a step of BetterTogether failed")
    last = next(tried for tried in compiled.candidate_programs if tried["strategy"] == "w -> fst")
    spent = at.spent_by_fst()
    learnt = read_json(at.folder / "w" / "sft-000001" / "job.json")["updates"]
    evaluated = len(compiled.candidate_programs) * len(at.lab.valset)
    rollouts = spent["rollouts"] + TRAIN + evaluated
    return last["program"], {"rollouts": rollouts, "updates": spent["updates"] + learnt}


ARMS: dict[str, Callable[[Setting], tuple[dspy.Module, dict[str, int]]]] = {
    "BootstrapFinetune": bootstrap_finetune,
    "GRPO": grpo,
    "BetterTogether, w -> fst": better_together,
    "FST alone": fst_alone,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a new folder, where all runs are kept")
    parser.add_argument("--engine", choices=("in_process", "vllm"), default="in_process")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, help=f"updates of FST alone, for a trial without results ({STEPS})")
    options = parser.parse_args()
    if options.steps is not None and options.steps <= TRADED:
        parser.error(f"--steps {options.steps}: BetterTogether makes {TRADED} updates fewer; use {TRADED + 1} or more")
    dspy.disable_logging()
    results = read_json(RESULTS) or {}
    for seed in options.seeds:
        for name in options.arms:
            results.setdefault(options.engine, {}).setdefault(name, {})[str(seed)] = arm(options, name, seed)
            if options.steps is None:
                write_json(RESULTS, results)


def arm(options: argparse.Namespace, name: str, seed: int) -> dict[str, object]:
    """One arm on one seed: held-out accuracy before and after, and what it spent."""
    engine: EngineKind = options.engine
    lab = build(WORLD, seed, train=TRAIN, val=VAL, test=TEST)
    lm = PolicyLM(BASE, engine=engine, max_tokens=16)
    lab.program.set_lm(lm)
    folder = options.run_dir / f"{name.split(',')[0].replace(' ', '-')}-{seed}"
    at = Setting(lab, lm, seed, folder, STEPS if options.steps is None else options.steps)
    before, began = at.accuracy(lab.program), time.monotonic()
    compiled, spent = ARMS[name](at)
    seconds = time.monotonic() - began
    after = at.accuracy(compiled)
    for policy in {policy_of(compiled), lm}:
        policy.release()
    print(f"{engine} {name}, seed {seed}: {before:.3f} -> {after:.3f}, {spent}, {seconds:.0f} s", flush=True)
    return {"before": before, "after": after, "spent": spent, "seconds": seconds}


if __name__ == "__main__":
    main()
