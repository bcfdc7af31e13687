"""The gap between what an engine records and what the trainer scores: the same weights, real prompts."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.real_model.runs import MAX_TOKENS, OPTIONS, Engine, Precision
from benchmarks.real_model.shares import play
from dspy_fst import PolicyLM
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Rollout
from programs import smollm2

PROMPTS = (("ChatAdapter", 0), ("JSONAdapter", 2), ("XMLAdapter", 2))
"""Adapters with their demos; eight replies each."""


@dataclass(frozen=True)
class Gap:
    """Of all sampled tokens, in nats."""

    tokens: int
    mean: float
    largest: float


def trainer_of(precision: Precision) -> Trainer:
    """SmolLM2 in a trainer that computes in this precision."""
    settings = TrainingSettings(learning_rate=1e-6, precision=precision, micro_batch_tokens=1024)
    return Trainer(smollm2.folder(), settings, device="cpu")


def gaps(trainer: Trainer, rollouts: list[Rollout]) -> list[float]:
    """|log-probability that the engine recorded - the trainer's| of every sampled token."""
    calls = [call for rollout in rollouts for call in rollout.calls]
    pairs = zip(calls, trainer.logprobs(calls), strict=True)
    return [abs(a - b) for call, scores in pairs for a, b in zip(call.logprobs, scores, strict=True)]


def measure(engine: Engine, precision: Precision) -> Gap:
    """Serve what the trainer publishes, sample replies, and score them on both sides."""
    trainer = trainer_of(precision)
    with tempfile.TemporaryDirectory() as folder:
        published = trainer.publish(Path(folder) / "start", "start")
        options = {**OPTIONS[engine], "dtype": precision}
        policy = PolicyLM(published.path, engine=engine, max_tokens=MAX_TOKENS, engine_options=options)
        found = [gap for adapter, demos in PROMPTS for gap in gaps(trainer, play(policy, adapter, demos, 8))]
        policy.release()
    return Gap(len(found), fmean(found), max(found))
