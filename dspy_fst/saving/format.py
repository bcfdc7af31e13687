"""The documents of a saved program and their allowed contents. Nothing in them is trusted before it is checked here."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import dspy
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dspy_fst.engine.options import PolicyState, Positive
from dspy_fst.errors import RunDirectoryError
from dspy_fst.formatting.demo_texts import is_demos
from dspy_fst.recipe.declared import sentences
from dspy_fst.rollout.chat_adapters import SavedAdapter
from dspy_fst.rollout.components import demos_in, flexes, speakers, texts_like
from dspy_fst.run.directory import COMPILED, is_run
from dspy_fst.run.ending import why_no_program
from dspy_fst.run.files import population_from_json
from dspy_fst.saving.manifest import MANIFEST, read_document, weights_faults
from dspy_fst.saving.program_state import SavedFlex, read_state
from dspy_fst.types import Candidate, Population

PROGRAM, POPULATION, POLICY, WEIGHTS = "program.json", "population.json", "policy.json", "weights"
M = TypeVar("M", bound=BaseModel)
DOCUMENTS = (MANIFEST, PROGRAM, POPULATION, POLICY)
CARD = "README.md"
ASIDE = (CARD, ".gitattributes", ".cache")
"""Files of an exported folder that may change: the model card, and what the Hugging Face hub and its client add."""
CONVERTED = "*.gguf"
"""Files of an exported folder that hold its weights for other programs; nothing here reads them."""
TRUST = "if you trust it, say so: load(..., trust_code=True), or --trust-code to a command"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Sampling(Strict):
    """How one predictor samples from the policy."""

    temperature: float = Field(ge=0, allow_inf_nan=False)
    max_tokens: Positive | None
    own: "OwnSampling | None" = None
    """What the predictor itself sets; None in folders of earlier releases, where the program's own code decides."""


class OwnSampling(Strict):
    """Sampling settings that a predictor was created with; for DSPy they override its LM's."""

    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_tokens: Positive | None = None


class SavedPolicy(Strict):
    """policy.json."""

    policy: PolicyState
    predictors: dict[str, Sampling]
    frozen: dict[str, str]
    """Predictor -> model of its frozen LM, which the user sets again after loading."""
    adapter: SavedAdapter | None = None
    """The adapter of the training; None in folders of releases that did not record it."""

    @model_validator(mode="after")
    def _adapter_sets_what_it_may(self) -> "SavedPolicy":
        if self.adapter is not None and (faults := self.adapter.faults()):
            raise ValueError("; ".join(faults))
        return self


class SavedPopulation(Strict):
    """population.json."""

    members: list[dict[str, str]] = Field(min_length=1)
    scores: list[float | None]
    parents: dict[str, list[str]]


def weights_in(folder: Path) -> Path:
    """The folder of a saved program's weights: weights/, or the folder itself when the program was exported."""
    return folder / WEIGHTS if (folder / WEIGHTS).exists() else folder


def unread_in(folder: Path) -> tuple[str, ...]:
    """The names at the top of a saved program's folder that nothing here reads; none, unless it was exported."""
    return (*ASIDE, *(path.name for path in folder.glob(CONVERTED))) if weights_in(folder) == folder else ()


def is_saved(path: Path) -> bool:
    """Whether the path is a saved program, and not the directory of a run."""
    return (path / POLICY).is_file()


def saved_in(path: Path) -> Path:
    """The saved program that a folder is, or that a run's directory holds.

    Raises:
        RunDirectoryError: there is none; the message says how to make one.
    """
    for folder in (path, path / COMPILED):
        if is_saved(folder):
            return folder
    if is_run(path):
        raise RunDirectoryError(why_no_program(path))
    raise RunDirectoryError(f"{path} holds no {COMPILED}/ and is no folder of dspy_fst.save")


def refuse_other_folders(path: Path) -> None:
    """Refuse a run's directory, or an exported part of a program, where a saved program is expected.

    Raises:
        RunDirectoryError: the path is one of these; the message says what to load.
    """
    if is_saved(path):
        return
    if is_run(path):
        raise RunDirectoryError(f"{path} is a run's directory; load its program from {saved_in(path)}")
    if (path / CARD).is_file() and (path / PROGRAM).is_file():
        raise RunDirectoryError(
            f"{path} holds a part of a program's weights: LoRA adapters without their base, or the weights of some "
            "predictors; load the run's compiled/ or what dspy_fst.save wrote. Its README.md says how others use it"
        )


def read_saved(
    folder: Path, program: dspy.Module, *, trust_code: bool = False
) -> tuple[SavedPolicy, Population, dict[str, object]]:
    """The folder's documents, after a check that they set nothing that they may not.

    Args:
        trust_code: Whether a dspy.Flex may get another source than the program's own.

    Raises:
        RunDirectoryError: a document sets more than it may, or belongs to another program.
    """
    weights = weights_in(folder)
    names = {path.name for path in folder.iterdir()}
    if weights != folder and (foreign := sorted(names - {*DOCUMENTS, WEIGHTS})):
        raise RunDirectoryError(f"{folder}: {', '.join(foreign)} is no part of a saved program; do not use the folder")
    if faults := weights_faults(weights, unread_in(folder)):
        raise RunDirectoryError(f"{folder} is not loaded: {'; '.join(faults)}")
    saved = _parse(SavedPolicy, folder / POLICY)
    listed = _parse(SavedPopulation, folder / POPULATION)
    components = texts_like(Candidate(listed.members[0]), program).texts.keys()
    differing = {name for texts in listed.members for name in components ^ texts.keys()}
    differing |= {*saved.predictors, *saved.frozen} - speakers(program).keys()
    if differing:
        raise RunDirectoryError(f"{folder} was saved from another program; predictors that differ: {sorted(differing)}")
    _refuse_unreadable_demos(folder, listed)
    if len(listed.scores) != len(listed.members):
        raise RunDirectoryError(f"{folder / POPULATION}: there must be a score, or null, for each member")
    state = read_state(folder / PROGRAM, read_document(folder / PROGRAM), program)
    if not trust_code:
        states = {name: SavedFlex.model_validate(state[name]).module_src for name in flexes(program)}
        refuse_code(folder, program, [states, *listed.members])
    population = population_from_json({"members": listed.members, "scores": listed.scores, "parents": listed.parents})
    return saved, population, state


def _refuse_unreadable_demos(folder: Path, listed: SavedPopulation) -> None:
    for name, text in {item for texts in listed.members for item in texts.items() if is_demos(item[0])}:
        try:
            demos_in(text)
        except ValueError as error:
            raise RunDirectoryError(f"{folder / POPULATION}: {name}: {error}; save the program again") from error


def _parse(document: type[M], path: Path) -> M:
    try:
        return document.model_validate(read_document(path))
    except ValidationError as error:
        raise RunDirectoryError(
            f"{path}: {'; '.join(sentences(error))}. A saved program sets only what belongs to it; give the rest to "
            "load(), e.g. engine_options={...}"
        ) from error


def refuse_code(path: Path, program: dspy.Module, texts: Iterable[Mapping[str, str]]) -> None:
    """Refuse sources of a dspy.Flex that differ from the program's own: whoever made ``path`` chose what would run.

    Args:
        texts: For each candidate, component -> text.

    Raises:
        RunDirectoryError: a dspy.Flex has another source in one of them.
    """
    texts = list(texts)
    for name, flex in flexes(program).items():
        if {candidate.get(name, flex.module_src) for candidate in texts} - {flex.module_src}:
            raise RunDirectoryError(
                f"{path}: it holds another source for the dspy.Flex {name!r} than this program, and it would be run. "
                f"Read it there (in {POPULATION} and {PROGRAM}, or in a run's populations/ and events.jsonl); {TRUST}"
            )
