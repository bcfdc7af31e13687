"""``micro_batch_tokens`` and ``gradient_checkpointing`` as ``"auto"``: chosen once at a run's start, then read from its
events."""

from pathlib import Path

from dspy_fst.config import FSTConfig
from dspy_fst.memory.arithmetic import LARGEST_ON_CPU
from dspy_fst.memory.does_it_fit import MemoryPlan
from dspy_fst.run.directory import read_events


def with_recorded_micro_batch(config: FSTConfig, run_dir: Path) -> FSTConfig:
    """The recipe with each ``"auto"`` replaced by what the run in ``run_dir`` began with, if it has begun.

    The run's first plan event holds both. Earlier releases wrote their default number there, and no checkpointing.
    """
    plan = next((event for event in read_events(run_dir) if event.get("event") == "plan" and "config" in event), None)
    recorded = (plan or {}).get("config") or {}
    tokens, again = recorded.get("micro_batch_tokens"), recorded.get("gradient_checkpointing")
    if config.micro_batch_tokens == "auto" and isinstance(tokens, int) and tokens >= 1:
        config = _with(config, micro_batch_tokens=tokens)
    if config.gradient_checkpointing == "auto" and isinstance(again, bool):
        config = _with(config, gradient_checkpointing=again)
    return config


def with_chosen_micro_batch(config: FSTConfig, plan: MemoryPlan | None) -> FSTConfig:
    """The recipe with each ``"auto"`` replaced by the plan's choice; where the model is unknown, by a CPU's largest
    number and no checkpointing."""
    if config.micro_batch_tokens == "auto":
        config = _with(config, micro_batch_tokens=LARGEST_ON_CPU if plan is None else plan.micro_batch_tokens)
    if config.gradient_checkpointing == "auto":
        config = _with(config, gradient_checkpointing=plan is not None and plan.gradient_checkpointing)
    return config


def _with(config: FSTConfig, **chosen: int) -> FSTConfig:
    return config.model_copy(update=chosen)
