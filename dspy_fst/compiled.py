"""A compiled program: the user's own program class, speaking evolved instructions with trained weights.

On it: ``population`` (Population), ``candidate_programs`` (``[{"score", "program"}]``, best first),
``detailed_results`` (CompiledResults) and ``_compiled``. Its PolicyLM is the trained one, on a running engine.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import RunDirectoryError
from dspy_fst.policy import PolicyLM
from dspy_fst.rollout.player import Task
from dspy_fst.rollout.texts import with_texts
from dspy_fst.run.files import population_from_json, population_to_json, write_json
from dspy_fst.session import version_of
from dspy_fst.types import Candidate, CycleReport, Population, Problem, StepReport

if TYPE_CHECKING:
    from dspy_fst.session import Session

FORMAT = 1


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
    score_of = {m.digest: score for m, score in zip(population.members, population.scores, strict=True)}
    programs = [{"score": score_of[m.digest], "program": with_texts(run.program, m)} for m in population.unique()]
    compiled = with_texts(run.program, population.best)
    compiled.population = population
    compiled.candidate_programs = programs
    if track_stats:
        compiled.detailed_results = CompiledResults(
            run_dir=run.run.path,
            cycles=tuple(run.cycle_reports),
            steps=tuple(run.step_reports),
            validation=validation,
        )
    compiled._compiled = True
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


def save(compiled: dspy.Module, path: str | Path) -> Path:
    """Write a compiled program: instructions and demos, the population, and the Hugging Face weights together.

        OUT/program.json      DSPy's own state, without LMs
        OUT/population.json   the K candidates and their scores
        OUT/policy.json       how to speak with the weights
        OUT/weights/          a Hugging Face folder

    Raises:
        FileExistsError: ``path`` exists; nothing is ever overwritten.
        ValueError: the program was not compiled by FSTOptimizer.
    """
    path = Path(path).resolve()
    if not isinstance(getattr(compiled, "population", None), Population):
        raise ValueError("the program carries no population; compile it with FSTOptimizer first")
    if path.exists():
        raise FileExistsError(f"{path} exists; name a new folder")
    policy = policy_of(compiled)
    partial = path.with_name(path.name + ".new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(policy.checkpoint.path, partial / "weights")
    bare = compiled.deepcopy()
    trained = [name for name, predictor in bare.named_predictors() if isinstance(predictor.lm, PolicyLM)]
    for name, predictor in bare.named_predictors():
        if name in trained:
            predictor.lm = None
    bare.save(partial / "program.json")
    write_json(partial / "population.json", population_to_json(compiled.population))
    write_json(
        partial / "policy.json", {"format": FORMAT, "predictors": trained, **policy.dump_state(), "model": "weights"}
    )
    partial.rename(path)
    return path


def load(path: str | Path, program: dspy.Module, **policy_settings: Any) -> dspy.Module:
    """A copy of ``program`` as it was compiled and saved: its instructions, population and trained weights.

    Args:
        path: A folder written by `save`.
        program: A fresh program of the same class; it is not changed.
        **policy_settings: Override how the weights are served, e.g. ``engine="vllm"``.

    Raises:
        RunDirectoryError: the folder is not a saved program, or of another program.
    """
    path = Path(path).resolve()
    try:
        settings = json.loads((path / "policy.json").read_text())
        population = population_from_json(json.loads((path / "population.json").read_text()))
    except (OSError, ValueError, KeyError) as error:
        raise RunDirectoryError(f"{path} is not a program saved by dspy_fst.save: {error}") from error
    names = {name for name, _ in program.named_predictors()}
    if differing := names.symmetric_difference(population.best.texts):
        raise RunDirectoryError(f"{path} was saved from another program; predictors that differ: {sorted(differing)}")
    trained = settings.pop("predictors")
    for key in ("format", "_dspy_lm_class"):
        settings.pop(key, None)
    policy = PolicyLM(**{**settings, "model": path / "weights", **policy_settings})
    loaded = program.deepcopy()
    own = {name: predictor.lm for name, predictor in program.named_predictors()}
    loaded.load(path / "program.json")
    for name, predictor in loaded.named_predictors():
        predictor.lm = policy if name in trained else predictor.lm or own[name]
    loaded.population = population
    loaded._compiled = True
    return loaded


def policy_of(program: dspy.Module) -> PolicyLM:
    """The PolicyLM that a program's trained predictors speak with.

    Raises:
        ValueError: there is none.
    """
    for _, predictor in program.named_predictors():
        if isinstance(predictor.lm, PolicyLM):
            return predictor.lm
    raise ValueError("the program has no PolicyLM; compile it with FSTOptimizer first")


def start_of(compiled: dspy.Module) -> Checkpoint:
    """The weights that the program's run started from, kept in its run directory."""
    version = version_of(0)
    path = policy_of(compiled).checkpoint.path.parent / version
    if not path.is_dir():
        raise ValueError(f"the weights that training started from are not at {path}; they stay in the run directory")
    return Checkpoint(version, path)
