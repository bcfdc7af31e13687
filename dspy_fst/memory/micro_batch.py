"""``micro_batch_tokens="auto"``: chosen once at a run's start, then read from the run's events."""

from pathlib import Path

from dspy_fst.config import FSTConfig
from dspy_fst.memory.arithmetic import LARGEST_ON_CPU
from dspy_fst.memory.does_it_fit import MemoryPlan
from dspy_fst.run.directory import read_events


def with_recorded_micro_batch(config: FSTConfig, run_dir: Path) -> FSTConfig:
    """The recipe with ``"auto"`` replaced by the number that the run in ``run_dir`` began with, if it has begun.

    The run's first plan event holds the number. Earlier releases wrote their default there.
    """
    plan = next((event for event in read_events(run_dir) if event.get("event") == "plan" and "config" in event), None)
    if config.micro_batch_tokens != "auto" or plan is None:
        return config
    recorded = (plan["config"] or {}).get("micro_batch_tokens")
    return _with(config, recorded) if isinstance(recorded, int) and recorded >= 1 else config


def with_chosen_micro_batch(config: FSTConfig, plan: MemoryPlan | None) -> FSTConfig:
    """The recipe with ``"auto"`` replaced by the plan's number, or by a CPU's largest where the model is unknown."""
    if config.micro_batch_tokens != "auto":
        return config
    return _with(config, LARGEST_ON_CPU if plan is None else plan.micro_batch_tokens)


def _with(config: FSTConfig, tokens: int) -> FSTConfig:
    return config.model_copy(update={"micro_batch_tokens": tokens})
