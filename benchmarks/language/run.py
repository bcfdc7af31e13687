"""One run of one arm on SmolLM2, in a process of its own: train, then measure its checkpoints on held-out problems.

python -m benchmarks.language.run fst --world desk --seed 0 --out runs/language/fst-desk-0
"""

import atexit
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import dspy
import torch
import transformers
from dspy import lm15

from benchmarks.evidence.run import Run, accuracy, asked, make, merged
from benchmarks.language.arms import ARMS, RECIPE, SELF_REFLECTING
from dspy_fst import PolicyLM
from dspy_fst.engine.base import Checkpoint
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.rollout.rollouter import Task as Rolled
from dspy_fst.types import Candidate, Problem, Rollout
from programs.common import Task
from programs.language import EXPERT, TASKS
from programs.language.feedback import EachText, FeedbackProposer
from programs.language.turns import TurnsAdapter
from programs.smollm2 import folder

MAX_TOKENS = 48
"""Of a reply: the longest of the right form takes about 35."""
TEMPERATURE = 1.0
"""Of sampling, in training and in measuring. At 0.7 more answers are right, and RL had no group with differences left
after nine updates."""
OTHERS = ("slips", "desk")
"""Tasks that show what other instructions still do: the first that is not the run's own."""
PLAIN = Path(__file__).parent / "plain.txt"
"""Plain English, written for this and published nowhere else before."""
REFLECTION_TOKENS = 96
"""Of a text that SmolLM2 proposes."""
READ = 200
"""Characters of a record's feedback that SmolLM2 reads."""
ASKED = (
    "A helper was told:\n{text}\n\nThis is what was wrong with its answers:\n{feedback}\n\n"
    "Write a better instruction for the helper, in one or two sentences."
)
VAL = 8
"""Problems of the validation set; each costs a rollout a cycle."""
ENGINE: dict[str, Any] = {"dtype": "float32", "max_batch_tokens": 16384}
"""In float32: without AMX a CPU is several times slower in bfloat16."""


@dataclass(frozen=True)
class LanguageRun(Run):
    """A run whose world is a task of `programs.language` and whose base is SmolLM2."""

    base: str = field(default_factory=lambda: str(folder()))
    module: ClassVar[str] = "benchmarks.language.run"
    problems: ClassVar[int] = 48
    samples: ClassVar[int] = 1
    limit_s: ClassVar[int] = 4 * 3600

    @property
    def recipe(self) -> dict[str, Any]:
        return {**RECIPE, **ARMS[self.arm], **self.changes}

    def world_mark(self) -> str:
        """Of the problems, the demos and the feedback on a wrong answer.

        Raises:
            ValueError: there is no such task.
        """
        task = self.task()
        said = [task.metric(example, dspy.Prediction()).feedback for example in task.valset]
        shown = [dict(demo) for predictor in task.program.predictors() for demo in predictor.demos]
        texts = [dict(example) for example in task.testset]
        return hashlib.sha256(json.dumps([texts, shown, said], sort_keys=True).encode()).hexdigest()[:16]

    def task(self) -> Task:
        """Raises:
        ValueError: there is no such task.
        """
        if self.world not in TASKS:
            raise ValueError(f"world {self.world!r}: there is no such task; take one of {', '.join(TASKS)}")
        return TASKS[self.world](val=VAL, test=self.problems, seed=self.seed)

    def policy(self) -> PolicyLM:
        return speaker(self.weights)

    def proposer(self) -> dict[str, Any]:
        """The feedback-only proposer, or the base model in its place; that one is never trained."""
        if self.arm == SELF_REFLECTING:
            policy = self.policy()
            atexit.register(policy.release)  # its thread would abort the process at the end
            return {"propose": Reflecting(reflection_lm(policy))}
        return {"propose": FeedbackProposer(self.seed)}

    def others(self, checkpoint: Checkpoint) -> float:
        """The accuracy on another task, which the run never saw, under an instruction that tells its rules."""
        name = next(other for other in OTHERS if other != self.world)
        task = TASKS[name](val=VAL, test=self.problems)
        texts = told(read_texts(task.program), EXPERT[name])
        with merged(checkpoint) as weights:
            return accuracy(played(task, speaker(weights), texts))

    def perplexity(self, checkpoint: Checkpoint) -> float:
        """Of a page of plain English that no task has to do with."""
        with merged(checkpoint) as weights:
            return perplexity(weights, PLAIN.read_text())


def speaker(weights: Path, temperature: float = TEMPERATURE) -> PolicyLM:
    """SmolLM2 with these weights, as every run and measurement asks it."""
    return PolicyLM(weights, engine="in_process", temperature=temperature, max_tokens=MAX_TOKENS, engine_options=ENGINE)


def told(texts: Candidate, instructions: Mapping[str, str]) -> Candidate:
    """The program's texts with these instructions in place of its own."""
    return Candidate({name: instructions.get(name, text) for name, text in texts.texts.items()})


def played(task: Task, policy: PolicyLM, texts: Candidate) -> list[Rollout]:
    """One reply to each held-out problem; the weights are let go of then."""
    task.program.set_lm(policy)
    settings = RolloutSettings(num_threads=RECIPE["num_threads"])
    rollouter = Rollouter(task.program, Reward(task.metric), settings, policy.handle.ready().expect)
    try:
        return rollouter.rollout([Rolled(Problem(i, e), texts, 0) for i, e in enumerate(task.testset)], "held out")
    finally:
        policy.release()


def perplexity(weights: Path, text: str) -> float:
    """exp of the mean cross-entropy of the text's tokens, each given all before it."""
    tokens = transformers.AutoTokenizer.from_pretrained(weights)(text, return_tensors="pt")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    with torch.inference_mode():
        return math.exp(model(tokens, labels=tokens).loss.item())


class Frozen:
    """DSPy's engine behind `reflection_lm`: a model that no run trains. Each request is another draw."""

    def __init__(self, policy: PolicyLM) -> None:
        self._policy = policy
        self._draws = itertools.count()

    def complete(self, request: lm15.Request) -> lm15.Response:
        return self._policy.handle.ready().complete(request, seed=next(self._draws)).response

    def __deepcopy__(self, memo: dict[int, object]) -> "Frozen":
        return self


class Reflecting(EachText):
    """GEPA's ``ProposalFn`` that asks an LM in plain words and takes the first paragraph of what it says.

    GEPA's own proposer asks for a JSON object here, and no reply of SmolLM2 held one: its search ends in an error.
    """

    def __init__(self, lm: dspy.LM) -> None:
        self._lm = lm

    def propose(self, text: str, records: Sequence[Mapping[str, Any]]) -> str:
        feedback = "\n".join(f"- {' '.join(str(record.get('Feedback', '')).split())[:READ]}" for record in records)
        said = str(self._lm(ASKED.format(text=text, feedback=feedback))[0])
        return said.strip().split("\n\n")[0].strip() or text


def reflection_lm(policy: PolicyLM) -> dspy.LM:
    """An LM of its own that stays as the policy started: a run refuses a PolicyLM itself as its reflection LM."""
    return dspy.LM("base", engine=Frozen(policy), cache=False, max_tokens=REFLECTION_TOKENS, temperature=1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    values, out = asked(arguments, __doc__, ARMS)
    with dspy.context(adapter=TurnsAdapter()):
        make(LanguageRun(**values), out)


if __name__ == "__main__":
    main()
