"""What a model card tells, gathered from a saved program and the run in whose directory it lies."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dspy_fst.errors import RunDirectoryError
from dspy_fst.model_files.lora_folder import INDEX
from dspy_fst.recipe.declared import sentences
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.run_record import RunRecord
from dspy_fst.run.directory import Event, read_events
from dspy_fst.run.files import population_from_json, read_json
from dspy_fst.saving.card import Facts
from dspy_fst.saving.format import POLICY, POPULATION, PROGRAM, WEIGHTS, SavedPolicy
from dspy_fst.saving.manifest import MANIFEST, read_document
from dspy_fst.saving.program_state import parts_in
from dspy_fst.types import Population

PACKAGES = ("dspy-fst", "dspy", "gepa", "torch", "transformers")


def facts_of(saved: Path) -> Facts:
    """The facts of a saved program.

    Raises:
        RunDirectoryError: a document cannot be read, or the run beside it ended with other weights.
    """
    try:
        policy = SavedPolicy.model_validate(read_document(saved / POLICY))
    except ValidationError as error:
        raise RunDirectoryError(f"{saved / POLICY}: {'; '.join(sentences(error))}") from error
    run = run_at(saved.parent)
    if run is not None and run.record.weights != policy.policy.version:
        raise RunDirectoryError(
            f"{saved} holds the weights {policy.policy.version}, but the run beside it ended with "
            f"{run.record.weights}; move the saved program out of that run's directory"
        )
    population = population_from_json(read_document(saved / POPULATION))
    return Facts(
        population=population,
        policy=policy,
        saved_by=read_document(saved / MANIFEST)["package"],
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        record=run.record if run else None,
        plan=run.plan if run else {},
        base=run.base if run else None,
        base_folder=run.folder if run else None,
        merged=(saved / WEIGHTS / INDEX).is_file(),
        foreign_code=_holds_foreign_code(read_document(saved / PROGRAM), population, run),
    )


def _holds_foreign_code(state: object, population: Population, run: "RunFacts | None") -> bool:
    """Whether a dspy.Flex may have another source than the run started from, and so than a fresh program has.

    Without the run, or after an earlier one, the starting source is unknown and counts as foreign.
    """
    for name, part in parts_in(state).items():
        if isinstance(part, Mapping) and "module_src" in part:
            started = {node.texts.get(name) for node in run.record.nodes if node.born is None} if run else set()
            if run is None or run.carried or {member.texts[name] for member in population.members} - started:
                return True
    return False


@dataclass(frozen=True)
class RunFacts:
    """The run whose directory holds the saved program."""

    record: RunRecord
    plan: Event
    base: str | None
    """The hub name of the model that it started from; None for a local folder."""
    folder: Path | None
    """The local folder that it started from, on the machine of the run; None for a hub name."""
    carried: bool
    """Whether it started from the population of an earlier run."""


def run_at(run_dir: Path) -> RunFacts | None:
    """The run of a directory; None where there is none."""
    if not (run_dir / "events.jsonl").is_file():
        return None
    (record,) = read_records([run_dir])
    plan = next((event for event in read_events(run_dir) if event["event"] == "plan"), {})
    recipe = read_json(run_dir / "recipe.json") or {}
    # The recipe has a fingerprint of a local folder's files, and none for a hub name.
    from_hub = "model" in recipe and recipe.get("model_files") is None
    model = str(recipe["model"]) if "model" in recipe else None
    folder = None if from_hub or model is None else Path(model)
    return RunFacts(record, plan, model if from_hub else None, folder, recipe.get("population") is not None)
