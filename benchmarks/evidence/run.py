"""One run of one arm in a process of its own: train, then measure its checkpoints on held-out problems.

python -m benchmarks.evidence.run fst --world reverse_drop --seed 0 --out runs/evidence/fst-reverse_drop-0

Measuring is outside of every budget: it happens after the run, on the weights and populations that the run left.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import transformers

from benchmarks.evidence.arms import ARMS, FAST, RECIPE
from benchmarks.evidence.marks import base_mark, world_mark
from dspy_fst import FSTOptimizer, PolicyLM, load, save
from dspy_fst.engine.base import Checkpoint
from dspy_fst.evaluation.run_reader import RunReader
from dspy_fst.evaluation.two_by_two_table import drift_of
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.costs import step_rollouts
from dspy_fst.rollout.components import texts_like
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.files import write_json
from dspy_fst.slow.checkpoint import write_merged
from dspy_fst.training.parse_trial import parse_share
from dspy_fst.types import Candidate, Problem, Rollout, version_of
from programs.common import Task as ProgramTask
from programs.lab import BASE, FeedbackProposer, build
from programs.lab.measure import load as load_model
from programs.lab.pretrain import one_thread, told_accuracy
from programs.lab.program import Lab
from programs.lab.prompt_lm import prompt_lm

INTERVAL = 3
TOLD = 12
"""Problems of each single operation, told, that show what other instructions still do."""
KEEP_ALL = 10_000
REPOSITORY = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Run:
    """Which run: everything that its result depends on."""

    arm: str
    world: str
    seed: int
    base: str = str(BASE)
    """Hugging Face folder, or a run of this benchmark to go on from."""
    carry: bool = False
    """Whether that run's population is carried on too, not only its weights."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the recipe, e.g. a tuned learning rate."""
    interval: int = INTERVAL
    """Updates between two measured checkpoints."""
    seed_interval: int = INTERVAL
    """Updates between two that are measured under the seed instruction too; the first and the last always are."""

    module: ClassVar[str] = "benchmarks.evidence.run"
    """What makes it in a process of its own; a subclass names its own module."""
    problems: ClassVar[int] = 96
    """Held-out problems of a measurement."""
    samples: ClassVar[int] = 2
    """Rollouts of each."""
    limit_s: ClassVar[int] = 3600

    @property
    def recipe(self) -> dict[str, Any]:
        return {**RECIPE, **ARMS[self.arm], **self.changes}

    @property
    def weights(self) -> Path:
        """Where its base's weights lie: a model folder, or what a finished run of this benchmark left."""
        final = Path(self.base) / "final" / "weights"
        return final if final.is_dir() else Path(self.base)

    def world_mark(self) -> str:
        """Raises:
        ValueError: the world cannot be used.
        """
        return world_mark(self.world)

    def marks(self) -> dict[str, str]:
        """Of what lies outside of the repository.

        Raises:
            ValueError: the world or the base cannot be used.
        """
        return {"world": self.world_mark(), "base": base_mark(self.weights)}

    def task(self) -> Lab | ProgramTask:
        """What is learnt, and the held-out problems that it is measured on."""
        return build(self.world, seed=self.seed, test=self.problems)

    def policy(self) -> PolicyLM:
        """Who speaks before training."""
        return PolicyLM(self.weights, engine="in_process", max_tokens=16)

    def proposer(self) -> dict[str, Any]:
        """Who searches, and who proposes texts. They are no part of the recipe, which is plain settings."""
        if self.arm in FAST:
            return {"fast": FAST[self.arm](), "reflection_lm": prompt_lm(self.seed)}
        return {"propose": FeedbackProposer(seed=self.seed)}

    def others(self, checkpoint: Checkpoint) -> float | None:
        """What weights are still worth on other instructions; None where nothing measures that."""
        return others_told(checkpoint)

    def perplexity(self, checkpoint: Checkpoint) -> float | None:
        """Of plain text under these weights; None where a base was never good at any."""
        return None


@one_thread()
def make(run: Run, out: Path) -> None:
    """Train, measure and write ``out/result.json``; a run that was killed goes on, one that is finished stays."""
    if (out / "result.json").exists():
        return
    transformers.logging.disable_progress_bar()
    made_at, marks, started = commit(), run.marks(), time.process_time()
    whole = not (out / "run").exists()
    lab = run.task()
    if run.carry:
        student = load(Path(run.base) / "final", lab.program)
    else:
        student = lab.program
        student.set_lm(run.policy())
    optimizer = FSTOptimizer(
        metric=lab.metric,
        **run.proposer(),
        run_dir=out / "run",
        seed=run.seed,
        keep_weights=KEEP_ALL,
        progress=False,
        **run.recipe,
    )
    compiled = optimizer.compile(student, trainset=lab.trainset, valset=lab.valset)
    trained_s = time.process_time() - started
    policy = policy_of(compiled)
    rollouter = Rollouter(compiled, Reward(lab.metric), RolloutSettings(), policy.handle.engine.expect, seed=run.seed)
    like = compiled.population.best
    texts = texts_like(like, lab.program), texts_like(like, compiled)
    measurer = Measurer(RunReader.of(out / "run"), rollouter, policy, texts, lab.testset, run.samples)
    steps = measurer.steps(run.interval)
    under_seed = measurer.steps(run.seed_interval)
    lines = [measurer.line(step, ("seed", "evolved") if step in under_seed else ("evolved",)) for step in steps]
    cells = measurer.cells(lines)
    ends = {"base": measurer.base, "trained": policy.checkpoint}
    others = {name: run.others(checkpoint) for name, checkpoint in ends.items()}
    perplexities = {name: run.perplexity(checkpoint) for name, checkpoint in ends.items()}
    shutil.rmtree(out / "final", ignore_errors=True)
    save(compiled, out / "final")
    policy.release()
    entropy = [[s.step, s.update.entropy] for s in measurer.past.record.steps if s.update.tokens]
    result = {**asdict(run), "recipe": run.recipe, "commit": made_at, "marks": marks, "lines": lines, "cells": cells}
    result |= {"other instructions": others, "perplexity": perplexities, "entropy": entropy}
    result["instruction"] = dict(measurer.compiled.texts)
    spent = {"training": trained_s, "measuring": time.process_time() - started - trained_s}
    result["CPU seconds"] = spent if whole else None  # a run that was killed spent more, in processes that are gone
    write_json(out / "result.json", result)
    shutil.rmtree(out / "run" / "weights")
    shutil.rmtree(out / "run" / "states")


class Measurer:
    """Plays held-out problems under what a run had at a step."""

    def __init__(
        self,
        past: RunReader,
        rollouter: Rollouter,
        policy: PolicyLM,
        texts: tuple[Candidate, Candidate],
        examples: Sequence[Any],
        samples: int,
    ):
        """`texts`: what the program started with, and what compile() returned; `samples`: rollouts of an example."""
        self.past, self.rollouter, self.policy = past, rollouter, policy
        self.seed, self.compiled = texts
        self.problems = [Problem(index, example) for index, example in enumerate(examples)]
        self.samples = samples
        self.trained = list(past.record.steps)
        self.base = past.checkpoint(version_of(0))

    def steps(self, interval: int) -> list[int]:
        """Steps to measure: numbers of updates made before; the first and the last are always among them."""
        last = len(self.trained)
        return [*range(0, last, interval), last]

    def line(self, step: int, under: Sequence[str]) -> dict[str, Any]:
        """Accuracy and drift of the weights after so many updates, and all that was spent by then.

        `under`: "seed" and "evolved", whose instructions it is measured under.
        """
        texts = {"seed": self.seed, "evolved": self._best(step)}
        checkpoint = self.past.checkpoint(self.past.version_after(step))
        line: dict[str, Any] = {"step": step, **self._spent(step)}
        for name in under:
            if name == "evolved" and texts[name] == self.seed and "seed" in under:
                line |= {key.replace("seed", name): line[key] for key in list(line) if key.startswith("seed ")}
                continue
            rollouts = self._play(checkpoint, texts[name])
            line[f"{name} accuracy"] = accuracy(rollouts)
            line[f"{name} parsed"] = parse_share(rollouts)
            drift = drift_of(checkpoint, self.base, rollouts) if step else None
            line[f"{name} KL per token"] = drift.per_token if drift else 0.0
            line[f"{name} KL per rollout"] = drift.per_rollout if drift else 0.0
        return line

    def cells(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The table of {base, trained} weights x {seed, evolved} instructions; three are measured already."""
        return {
            "base weights, seed instructions": lines[0]["seed accuracy"],
            "base weights, evolved instructions": accuracy(self._play(self.base, self.compiled))
            if self.trained
            else lines[-1]["evolved accuracy"],
            "trained weights, seed instructions": lines[-1]["seed accuracy"],
            "trained weights, evolved instructions": lines[-1]["evolved accuracy"],
        }

    def _best(self, step: int) -> Candidate:
        """What spoke when the step was made: the population's best by its anchors; at the end, what came back."""
        if step == len(self.trained):
            return self.compiled
        population = self.past.population(self.trained[step].cycle)
        return population.best if population else self.seed

    def _play(self, checkpoint: Checkpoint, candidate: Candidate) -> list[Rollout]:
        engine = self.policy.handle.engine
        if engine.weights != checkpoint.version:
            engine.load(checkpoint)
        tasks = [Task(problem, candidate, sample) for problem in self.problems for sample in range(self.samples)]
        return self.rollouter.rollout(tasks, "held out")

    def _spent(self, step: int) -> dict[str, int]:
        """Everything before this step, its cycle's search included."""
        done = self.trained[:step]
        last = step == len(self.trained)
        cycles = [c for c in self.past.record.cycles if last or c.cycle <= self.trained[step].cycle]
        return {
            "training rollouts": sum(step_rollouts(s.counts) for s in done),
            "search rollouts": sum(cycle.rollouts for cycle in cycles),
            "reflections": sum(cycle.reflections for cycle in cycles),
            "tokens sampled": sum(step.sampled_tokens for step in done) + sum(c.sampled_tokens for c in cycles),
            "tokens trained": sum(report.update.tokens for report in done),
            "updates": sum(report.update.rows > 0 for report in done),
        }


def accuracy(rollouts: Sequence[Rollout]) -> float:
    """Their mean score."""
    return statistics.fmean(rollout.reward for rollout in rollouts if rollout.reward is not None)


def others_told(checkpoint: Checkpoint) -> float:
    """What is left of following other instructions: mean accuracy over the laboratory's single operations, told."""
    with merged(checkpoint) as weights:
        return told_accuracy(*load_model(weights), samples=TOLD, seed=0)


@contextmanager
def merged(checkpoint: Checkpoint) -> Iterator[Path]:
    """A model folder of the checkpoint's weights, its adapter merged."""
    if not checkpoint.adapters:
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory() as folder:
        write_merged(checkpoint.folder, Path(folder))
        yield Path(folder)


def commit() -> str:
    """The repository's commit, with a mark when files were changed since; "unknown" outside of one.

    Results do not count: a grid writes them between its runs.
    """
    at = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return f"{at}-dirty" if at and changed else at or "unknown"


def _git(*words: str) -> str:
    try:
        told = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    except OSError:
        return ""
    return told.stdout.strip()


def asked(arguments: Sequence[str] | None, about: str | None, arms: Iterable[str]) -> tuple[dict[str, Any], Path]:
    """Fields of a Run, and its folder, from a command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=sorted(arms))
    parser.add_argument("--world", default="reverse_drop", help="a world's name or import path")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default=str(BASE), help="a Hugging Face folder, or a finished run to go on from")
    parser.add_argument("--carry", action="store_true", help="go on from that run's population too")
    parser.add_argument("--changes", type=json.loads, default={}, help="fields of the recipe, as JSON")
    parser.add_argument("--interval", type=int, default=INTERVAL, help="updates between two measured checkpoints")
    parser.add_argument("--seed-interval", type=int, default=INTERVAL, help="the same, under the seed instruction")
    parser.add_argument("--out", type=Path, required=True)
    values = vars(parser.parse_args(arguments))
    return values, values.pop("out")


def main(arguments: Sequence[str] | None = None) -> None:
    values, out = asked(arguments, __doc__, ARMS)
    make(Run(**values), out)


if __name__ == "__main__":
    main()
