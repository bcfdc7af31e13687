"""A compiled program: the user's own program class, speaking evolved instructions with trained weights.

On it: ``population`` (Population), ``candidate_programs`` (``[{"score", "program"}]``, best first),
``detailed_results`` (CompiledResults) and ``_compiled``. Its PolicyLM is the trained one, on a running engine, and it
speaks through the adapter of its training whatever DSPy is set to (`dspy_fst.rollout.adapters`).
`dspy_fst.saved` writes it to disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import dspy

from dspy_fst.engine.base import Checkpoint
from dspy_fst.rollout.adapters import adapter_in_force, keep, kept_by
from dspy_fst.rollout.player import Task
from dspy_fst.rollout.texts import carry, with_texts
from dspy_fst.saved import load, policy_of, save
from dspy_fst.types import Candidate, CycleReport, Population, Problem, StepReport, version_of

if TYPE_CHECKING:
    from dspy_fst.session import Session

__all__ = ["CompiledResults", "compiled_program", "load", "policy_of", "save", "start_of"]


@dataclass(frozen=True)
class CompiledResults:
    """What a run measured, for those who look closer."""

    run_dir: Path
    cycles: tuple[CycleReport, ...]
    """Reports of the cycles made in this process; ``events.jsonl`` holds those of earlier ones too."""
    steps: tuple[StepReport, ...]
    validation: Mapping[str, float]
    """Candidate digest -> mean validation score under the final weights; empty without a valset."""


def compiled_program(run: "Session", population: Population, *, track_stats: bool = True) -> dspy.Module:
    """The program that a run ends with."""
    validation = _validate(run, population)
    if validation:
        population = _ranked(population, validation)
    compiled = with_texts(run.program, population.best)
    keep(compiled, kept_by(compiled) or adapter_in_force())
    carry(compiled, population)
    if track_stats:
        compiled.detailed_results = CompiledResults(
            run_dir=run.run.path,
            cycles=tuple(run.cycle_reports),
            steps=tuple(run.step_reports),
            validation=validation,
        )
    run.run.emit("done", population=population, validation=validation, weights=run.policy.checkpoint.version)
    return compiled


def _validate(run: "Session", population: Population) -> dict[str, float]:
    """Mean score of each member on the valset under the final weights."""
    if not run.valset:
        return {}
    members = population.unique()
    run.run.tell({"event": "phase", "phase": "validating the population"})
    tasks = [
        Task(Problem(index, example), member, sample)
        for member in members
        for index, example in enumerate(run.valset)
        for sample in range(run.config.validation_samples)
    ]
    rollouts = run.player.play(tasks, "validation")
    scores = {}
    for member in members:
        rewards = [r.reward for r in rollouts if r.candidate.digest == member.digest and r.reward is not None]
        if rewards:
            scores[member.digest] = sum(rewards) / len(rewards)
    return scores


def _ranked(population: Population, validation: Mapping[str, float]) -> Population:
    """The population, best validation score first."""

    def score(member: Candidate) -> float:
        return validation.get(member.digest, float("-inf"))

    members = tuple(sorted(population.members, key=score, reverse=True))
    return replace(population, members=members, scores=tuple(validation.get(m.digest) for m in members))


def start_of(compiled: dspy.Module) -> Checkpoint:
    """The weights that the program's run started from, kept in its run directory."""
    version = version_of(0)
    path = policy_of(compiled).checkpoint.path.parent / version
    if not path.is_dir():
        raise ValueError(f"the weights that training started from are not at {path}; they stay in the run directory")
    return Checkpoint(version, path)
