"""A short compile() on the laboratory's base model, and everything that was played, sampled and learnt in it."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import dspy
import pytest
from transformers import AutoTokenizer

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine import generation
from dspy_fst.engine.base import Completion
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.run.directory import read_events
from dspy_fst.slow.trainer import Trainer
from dspy_fst.types import Batch, Call, Rollout, Row
from programs.lab import BASE, build
from programs.lab.tokenizer import signature

Tokens = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]
"""Prompt ids, completion ids and their log-probabilities."""

SHORT = {
    "cycles": 1,
    "steps_per_cycle": 1,
    "problems_per_step": 3,
    "population_size": 2,
    "group_size": 4,
    "search_rollouts": 12,
    "reflection_minibatch": 2,
    "components": "all",
    "learning_rate": 5e-4,
    "progress": False,
}
STEP = 12
"""Rollouts of the one step."""


def lab_policy(model: str | Path = BASE, temperature: float = 1.2, **options: Any) -> PolicyLM:
    """The base model at a temperature at which groups differ; its batches are cut by who waits, not by the clock."""
    options = {"linger_s": 60.0, **options}
    return PolicyLM(model, engine="in_process", max_tokens=16, temperature=temperature, engine_options=options)


def says(instruction: str, **config: Any) -> dspy.Predict:
    """The one predictor that the base model understands."""
    return dspy.Predict(signature(instruction), **config)


def shorter(gold: dspy.Example, pred: Any, trace: Any = None) -> float:
    """Rewards short answers: something that a group differs in."""
    return 1.0 / (1 + len(str(pred.answer)))


def odd(text: str) -> bool:
    """A coin that falls the same way for the same text."""
    return zlib.crc32(text.encode()) % 2 == 1


def append_words(candidate: dict[str, str], reflective_dataset: Any, components_to_update: list[str]) -> dict[str, str]:
    return {name: f"{candidate[name]} Be brief." for name in components_to_update}


@dataclass
class Watched:
    """One run: what its rollouter gave, what its engine sampled, what its trainer was given, and what it logged."""

    rollouts: list[tuple[str, Rollout]] = field(default_factory=list)
    """With the name of their draw, such as ``"step-0"``."""
    sampled: list[Tokens] = field(default_factory=list)
    """As they left the model, in the engine."""
    batches: list[Batch] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    compiled: dspy.Module | None = None

    @property
    def calls(self) -> list[Call]:
        return [call for _, rollout in self.rollouts for call in rollout.calls]

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self.batches for row in batch.rows]

    def played(self, draw: str) -> list[Rollout]:
        """Rollouts of the draws whose name begins so."""
        return [rollout for name, rollout in self.rollouts if name.startswith(draw)]

    def outcomes(self, draw: str) -> Counter[str]:
        """How the rollouts of a draw ended, by label."""
        return Counter(rollout.outcome.label for rollout in self.played(draw))

    def reports(self, kind: str) -> list[dict[str, Any]]:
        return [event["report"] for event in self.events if event["event"] == kind]

    def told(self) -> str:
        """Notes and warnings."""
        return "\n".join(event["text"] for event in self.events if event["event"] in ("note", "warning"))


def outcomes_in(counts: dict[str, int]) -> dict[str, int]:
    """The reasons that a report counts."""
    return dict(OutcomeCounts.of(counts).labels)


def tokens_of(call: Call | Row) -> Tokens:
    return call.prompt_ids, call.completion_ids, call.logprobs


@cache
def tokenizer() -> Any:
    """The base model's."""
    return AutoTokenizer.from_pretrained(BASE)


def assert_tokens_are_exact(run: Watched) -> None:
    """What is recorded, and what is learnt from, left the model so: none changed, none lost, none twice."""
    assert Counter(map(tokens_of, run.calls)) == Counter(run.sampled)
    assert Counter(map(tokens_of, run.rows)) <= Counter(run.sampled)
    for step in run.reports("step"):  # before the first update both sides hold the same weights
        assert step["update"]["max_log_ratio"] < 1e-4


def run_watched(
    program: dspy.Module,
    run_dir: Path,
    *,
    metric: Callable[..., Any] = shorter,
    trainset: Sequence[dspy.Example] | None = None,
    **recipe: Any,
) -> Watched:
    """Compile the program as the recipe says and watch. The compiled program's engine is stopped."""
    optimizer = FSTOptimizer(metric=metric, propose=append_words, run_dir=run_dir, **{**SHORT, **recipe})
    with _watching() as watched:
        problems = build(train=8, val=1, test=1).trainset if trainset is None else list(trainset)
        watched.compiled = optimizer.compile(program, trainset=problems)
    watched.events = read_events(run_dir)
    policies = {id(lm): lm for _, p in watched.compiled.named_predictors() if isinstance(lm := p.lm, PolicyLM)}
    for policy in policies.values():
        policy.release()
    return watched


@contextmanager
def _watching() -> Iterator[Watched]:
    watched = Watched()
    play, step, sample, complete = Rollouter.rollout, Trainer.step, generation.SideBySide.step, Supervisor.complete

    def watched_play(self: Rollouter, tasks: Any, draw: str, *rest: Any, **options: Any) -> list[Rollout]:
        rollouts = play(self, tasks, draw, *rest, **options)
        watched.rollouts += [(draw, rollout) for rollout in rollouts]
        return rollouts

    def watched_step(self: Trainer, batch: Batch, **options: Any) -> Any:
        watched.batches.append(batch)
        return step(self, batch, **options)

    def watched_sample(batch: generation.SideBySide) -> Any:
        ended = sample(batch)
        watched.sampled += [(call.prompt, tuple(reply.ids), tuple(reply.logprobs)) for call, reply in ended]
        return ended

    def watched_complete(self: Supervisor, request: Any, seed: int) -> Completion:
        reply = complete(self, request, seed)
        watched.sampled.append((reply.prompt_ids, reply.completion_ids, reply.logprobs))
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervisor, "complete", watched_complete)
        patch.setattr(Rollouter, "rollout", watched_play)
        patch.setattr(Trainer, "step", watched_step)
        patch.setattr(generation.SideBySide, "step", watched_sample)
        yield watched
