"""What SmolLM2 does on the three tasks before any run: which replies parse, what an instruction and weights are worth.

    python -m benchmarks.language.base                    # all of it: half an hour of one core
    python -m benchmarks.language.base --task slips --skip-weights

*seed*: the program as it is. *expert*: under an instruction that tells the rules (`programs.language.EXPERT`). *warm*:
the seed instruction again, after supervised learning from 32 labels, one pass. Replies are sampled at temperature 0.7
to the same held-out problems. Each line replaces its own in benchmarks/results/language_base.json.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import transformers

from benchmarks.evidence.run import accuracy
from benchmarks.language.arms import ARMS, RECIPE
from benchmarks.language.run import played, speaker, told
from dspy_fst import FSTOptimizer
from dspy_fst.errors import NothingLearnedError
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.run.files import read_json, write_json
from dspy_fst.training.parse_trial import parse_share
from dspy_fst.types import WARM_START
from programs.common import Task
from programs.language import EXPERT, TASKS
from programs.language.turns import TurnsAdapter
from programs.smollm2 import folder

RESULTS = Path(__file__).parent.parent / "results" / "language_base.json"
ADAPTERS: dict[str, type[dspy.Adapter]] = {"JSONAdapter": dspy.JSONAdapter, "TurnsAdapter": TurnsAdapter}
TEMPERATURE = 0.7
"""Of these replies. Runs sample at 1, where about half as many answers are right: they need differences."""
TRIFLE: dict[str, Any] = {"cycles": 1, "steps_per_cycle": 1, "problems_per_step": 1, "group_size": 2, "method": "rl"}
"""A run whose warm start is all that is looked at."""


@dataclass(frozen=True)
class Case:
    """One line: what is asked, in which form, under which texts and weights."""

    task: str
    adapter: str
    state: str
    """"seed", "expert" or "warm"."""

    @property
    def name(self) -> str:
        return f"{self.task}, {self.adapter}, {self.state}"


def cases(tasks: Sequence[str], adapters: Sequence[str], *, weights: bool) -> Iterator[Case]:
    """Both instructions under every adapter; learning under the last of them."""
    for task in tasks:
        yield from (Case(task, adapter, state) for adapter in adapters for state in ("seed", "expert"))
        if weights:
            yield Case(task, adapters[-1], "warm")


def measure(case: Case, replies: int) -> dict[str, Any]:
    """The share of the replies that parse, and the mean score of the programs' answers."""
    task = TASKS[case.task](test=replies)
    texts = read_texts(task.program)
    if case.state == "expert":
        texts = told(texts, EXPERT[case.task])
    with tempfile.TemporaryDirectory() as scratch, dspy.context(adapter=ADAPTERS[case.adapter]()):
        weights = warmed(task, Path(scratch)) if case.state == "warm" else folder()
        rollouts = played(task, speaker(weights, TEMPERATURE), texts)
    return {
        "task": case.task,
        "adapter": case.adapter,
        "state": case.state,
        "replies": replies,
        "parsed": parse_share(rollouts),
        "accuracy": accuracy(rollouts),
    }


def warmed(task: Task, run_dir: Path) -> Path:
    """Weights after one pass over 32 labels."""
    task.program.set_lm(speaker(folder()))
    recipe = {**RECIPE, **ARMS["warm"], **TRIFLE}
    optimizer = FSTOptimizer(metric=task.metric, run_dir=run_dir / "run", progress=False, **recipe)
    with suppress(NothingLearnedError):  # the one update after it may find both rollouts alike
        policy_of(optimizer.compile(task.program, trainset=task.trainset)).release()
    return run_dir / "run" / "weights" / WARM_START


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--adapter", nargs="+", choices=sorted(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--replies", type=int, default=96)
    parser.add_argument("--skip-weights", action="store_true", help="no line after supervised learning")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    for case in cases(options.task, options.adapter, weights=not options.skip_weights):
        lines = {**(read_json(options.out) or {}), case.name: measure(case, options.replies)}
        write_json(options.out, lines)
        print(json.dumps(lines[case.name]), flush=True)


if __name__ == "__main__":
    main()
