"""The run that is killed: two modules on the laboratory's base model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from dspy_fst import FSTOptimizer, PolicyLM
from programs.lab import BASE, FeedbackProposer, build
from programs.lab.tokenizer import signature

SMALL: dict[str, Any] = {
    "cycles": 2,
    "steps_per_cycle": 3,
    "problems_per_step": 2,
    "population_size": 2,
    "group_size": 4,
    "anchors": 4,
    "search_rollouts": 12,
    "learning_rate": 5e-4,
    "warmup_steps": 2,
    "num_threads": 8,
    "progress": False,
}
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "in_process": {"linger_s": 60.0},  # on a busy machine the default would cut batches, and so change the rounding
    "vllm": {"cpu_kv_cache_gib": 1},
}


class Relay(dspy.Module):
    """Two trained modules, one speaking after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(signature("Reverse the list."))
        self.last = dspy.Predict(signature("Drop the last number."))

    def forward(self, numbers: str) -> dspy.Prediction:
        return self.last(numbers=self.first(numbers=numbers).answer)


LAB = build(train=12, val=2, test=1)


def places_right(
    gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    """Share of the numbers that stand where they should: something that a group differs in."""
    wanted, got = gold.answer.split(), str(pred.answer).split()
    right = sum(one == other for one, other in zip(wanted, got, strict=False))
    return dspy.Prediction(score=right / max(len(wanted), len(got)), feedback=LAB.metric(gold, pred).feedback)


def compile_small(
    run_dir: Path,
    *,
    engine: str = "in_process",
    propose: Callable[..., dict[str, str]] | None = None,
    **settings: Any,
) -> dspy.Module:
    """The run that is killed: two modules on the laboratory's base model, a proposer that needs no LM."""
    program = Relay()
    options = ENGINE_OPTIONS[engine]
    program.set_lm(PolicyLM(BASE, engine=engine, max_tokens=12, engine_options=options))  # type: ignore[arg-type]
    optimizer = FSTOptimizer(
        metric=places_right, propose=propose or FeedbackProposer(), run_dir=run_dir, **{**SMALL, **settings}
    )
    return optimizer.compile(program, trainset=LAB.trainset, valset=LAB.valset)


@dataclass(frozen=True)
class Subject:
    """What is run, killed and continued."""

    make: Callable[..., Any]
    """Called with the run directory, ``engine``, ``propose`` and the settings; a child process must find it by name."""
    proposer: Callable[..., dict[str, str]]
    """Its proposals depend on its arguments alone."""


LABORATORY = Subject(compile_small, FeedbackProposer())
