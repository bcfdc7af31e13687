"""A compiled program: the user's own program class, speaking evolved instructions with trained weights.

On it: ``population`` (Population), ``candidate_programs`` (``[{"score", "program"}]``, best first),
``detailed_results`` (CompiledResults) and ``_compiled``. Its PolicyLM is the trained one, on a running engine, and it
speaks through the adapter of its training whatever DSPy is set to (`dspy_fst.rollout.adapters`).
`dspy_fst.saved` writes it to disk.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import dspy

from dspy_fst.engine.base import Checkpoint
from dspy_fst.fast.evolve import outcome_counts
from dspy_fst.preflight.what_helps import end_alternation
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
    """Candidate digest -> mean validation score under the final weights; empty without a valset. A candidate of which
    no rollout was measured has none."""
    validation_counts: Mapping[str, int] = field(default_factory=dict)
    """``rollouts``, ``masked: <reason>`` and ``failed: <reason>`` of the validation."""
    ending: str = ""
    """What the updates came to, e.g. ``"6 of 6 updates changed the weights"``."""


def compiled_program(run: "Session", population: Population, *, track_stats: bool = True) -> dspy.Module:
    """The program that a run ends with.

    Raises:
        NothingLearnedError: it stopped because nothing was learnt any more, and not because all was solved.
    """
    end_alternation(run)
    validation, counts = _validate(run, population)
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
            validation_counts=counts,
            ending=run.observer.ending.words,
        )
    weights, told = run.policy.checkpoint.version, {"validation": validation, "validation_counts": counts}
    run.run.emit("done", population=population, weights=weights, ending=run.observer.ending.words, **told)
    return compiled


def _validate(run: "Session", population: Population) -> tuple[dict[str, float], Counter[str]]:
    """Mean score of each member on the valset under the final weights, and how its rollouts ended."""
    if not run.valset:
        return {}, Counter()
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
    counts = Counter(rollouts=len(rollouts)) + outcome_counts(rollouts)
    for text in _validation_warnings(members, scores, counts):
        run.run.emit("warning", step=run.run.state.get("step", 0), text=text)
    return scores, counts


def _validation_warnings(
    members: Sequence[Candidate], scores: Mapping[str, float], counts: Mapping[str, int]
) -> Iterator[str]:
    """What the validation did not measure."""
    masked = {name.removeprefix("masked: "): count for name, count in counts.items() if name.startswith("masked: ")}
    if masked:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in masked.items())
        yield f"validation: {sum(masked.values())} of {counts['rollouts']} rollouts measured nothing ({reasons})"
    if not scores:
        yield "validation: nothing was measured, so the scores on the anchors choose the best candidate"
    elif lost := [member.digest for member in members if member.digest not in scores]:
        yield f"validation: no rollout of {', '.join(lost)} was measured; such candidates rank last"


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
