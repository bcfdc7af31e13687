"""A compiled program as a folder for others: a Hugging Face model that is also a DSPy program.

    OUT/config.json, *.safetensors, tokenizer...   the weights: transformers and vllm serve OUT
    OUT/program.json                               DSPy's own state: program.load(OUT/program.json)
    OUT/population.json, policy.json               with these, dspy_fst.load(OUT, program)
    OUT/README.md                                  a model card; it may be edited
    OUT/manifest.json                              checksums of all the others

The weights are complete. A LoRA adapter is merged into its base, in float32.
"""

import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import dspy
from pydantic import ValidationError

from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.model_files.lora_folder import INDEX
from dspy_fst.recipe.declared import sentences
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.run_record import RunRecord
from dspy_fst.run.directory import Event, read_events
from dspy_fst.run.files import flush, population_from_json, read_json, scratch_beside, writing
from dspy_fst.run.secrets import Redactor, secret_faults
from dspy_fst.saving.card import Facts, model_card
from dspy_fst.saving.format import (
    CARD,
    DOCUMENTS,
    POLICY,
    POPULATION,
    PROGRAM,
    WEIGHTS,
    SavedPolicy,
    saved_in,
    weights_in,
)
from dspy_fst.saving.manifest import MANIFEST, read_document, seal, verify, weights_faults
from dspy_fst.saving.program_state import parts_in
from dspy_fst.types import Population

PACKAGES = ("dspy-fst", "dspy", "gepa", "torch", "transformers")


def export(source: str | Path, out: str | Path) -> Path:
    """Write the folder. The program's code is not imported: everything is read from the saved program and its run.

    Args:
        source: A run's directory that holds ``compiled/``, or a folder written by `dspy_fst.save`. If that folder is in
            its run's directory, the card describes the training.
        out: The new folder.

    Raises:
        ConfigurationError: ``out`` exists (nothing is ever overwritten), or a document holds a secret.
        RunDirectoryError: there is no saved program, it is damaged, or the disk refused to write.
    """
    saved, out = _saved_in(Path(source).resolve()), Path(out).resolve()
    if out.exists():
        raise ConfigurationError([f"{out} exists; name a new folder"])
    if out.is_relative_to(saved):
        raise ConfigurationError([f"{out} lies in the saved program itself; name a folder elsewhere"])
    verify(saved)
    facts = _facts(saved)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(out) as scratch:
            _fill(scratch, saved, model_card(facts))
            scratch.rename(out)
            flush(out.parent)
    return out


def _saved_in(source: Path) -> Path:
    saved = saved_in(source)
    if weights_in(saved) == saved:
        raise RunDirectoryError(f"{source} was exported already; copy it as it is, or name what it was exported from")
    return saved


def _fill(folder: Path, saved: Path, card: str) -> None:
    """Copy the weights and the documents, write the card, and list all files in the manifest."""
    if faults := weights_faults(saved / WEIGHTS):
        raise RunDirectoryError(f"{saved} is not exported: {'; '.join(faults)}")
    documents = {name for name in DOCUMENTS if name != MANIFEST}
    if taken := sorted({path.name for path in (saved / WEIGHTS).iterdir()} & {*DOCUMENTS, CARD}):
        raise RunDirectoryError(
            f"{saved / WEIGHTS}: {', '.join(taken)} would be overwritten by the export's own file; "
            "remove it and save again"
        )
    if (saved / WEIGHTS / INDEX).is_file():
        from dspy_fst.slow.checkpoint import write_merged

        write_merged(saved / WEIGHTS, folder)
    else:
        shutil.copytree(saved / WEIGHTS, folder, dirs_exist_ok=True)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # transformers may make weights readable by their owner alone
    for name in documents:
        shutil.copyfile(saved / name, folder / name)
    (folder / CARD).write_text(card, encoding="utf-8", errors="replace")  # a model's text may hold half a character
    _refuse_secrets(folder)
    seal(folder, importlib.metadata.version("dspy-fst"))


def _refuse_secrets(folder: Path) -> None:
    """Refuse secrets in the documents, the card and the configurations. The vocabulary is the base model's."""
    redactor = Redactor.of(dspy.Module())  # knows the environment's secrets and the shapes of keys
    read: dict[str, object] = {path.name: read_document(path) for path in folder.glob("*config.json")}
    read |= {name: read_document(folder / name) for name in DOCUMENTS if name != MANIFEST}
    read |= {CARD: dict(enumerate((folder / CARD).read_text().splitlines(), start=1))}
    if faults := secret_faults(redactor, read):
        raise ConfigurationError(faults)


# ---- contents of the card ----------------------------------------------------------------------


def _facts(saved: Path) -> Facts:
    try:
        policy = SavedPolicy.model_validate(read_document(saved / POLICY))
    except ValidationError as error:
        raise RunDirectoryError(f"{saved / POLICY}: {'; '.join(sentences(error))}") from error
    run = _run(saved.parent)
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
        merged=(saved / WEIGHTS / INDEX).is_file(),
        foreign_code=_holds_foreign_code(read_document(saved / PROGRAM), population, run),
    )


def _holds_foreign_code(state: object, population: Population, run: "_Run | None") -> bool:
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
class _Run:
    """The run whose directory holds the saved program."""

    record: RunRecord
    plan: Event
    base: str | None
    """The hub name of the model that it started from; None for a local folder."""
    carried: bool
    """Whether it started from the population of an earlier run."""


def _run(run_dir: Path) -> _Run | None:
    if not (run_dir / "events.jsonl").is_file():
        return None
    (record,) = read_records([run_dir])
    plan = next((event for event in read_events(run_dir) if event["event"] == "plan"), {})
    recipe = read_json(run_dir / "recipe.json") or {}
    # The recipe has a fingerprint of a local folder's files, and none for a hub name.
    from_hub = "model" in recipe and recipe.get("model_files") is None
    base = str(recipe["model"]) if from_hub else None
    return _Run(record, plan, base, recipe.get("population") is not None)
