"""The micro-batch that a run keeps: chosen once at its start, then read from its record."""

from pathlib import Path

from dspy_fst.config import FSTConfig
from dspy_fst.memory.arithmetic import LARGEST_ON_CPU
from dspy_fst.memory.fitting import Fit
from dspy_fst.run.directory import read_events


def as_recorded(config: FSTConfig, run_dir: Path) -> FSTConfig:
    """The recipe with the number that the run in ``run_dir`` began with, when it says ``"auto"``.

    Its first plan event holds the number; earlier releases wrote their default there.
    """
    plan = next((event for event in read_events(run_dir) if event.get("event") == "plan" and "config" in event), None)
    if config.micro_batch_tokens != "auto" or plan is None:
        return config
    recorded = (plan["config"] or {}).get("micro_batch_tokens")
    return _with(config, recorded) if isinstance(recorded, int) and recorded >= 1 else config


def settled(config: FSTConfig, fit: Fit | None) -> FSTConfig:
    """The recipe with a number of tokens. Of a model that nothing is known of, a CPU's largest is taken."""
    if config.micro_batch_tokens != "auto":
        return config
    return _with(config, LARGEST_ON_CPU if fit is None else fit.micro_batch_tokens)


def _with(config: FSTConfig, tokens: int) -> FSTConfig:
    return config.model_copy(update={"micro_batch_tokens": tokens})
