"""Resumable states: numbered folders, complete, checksummed and never changed.

states/000007/state.json    the fields, a checksum of every other file and of itself
states/000007/trainer/...   weights, optimizer, schedule and generators
states/000007/NAME.json     a document that only what comes next needs (see `dspy_fst.training.reuse`)

A state appears by one rename, so a kill leaves either the previous state or the new one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.files import (
    DCP_METADATA,
    FileFacts,
    PopulationJson,
    file_facts,
    flush,
    read_json,
    remove,
    sha256_of,
    write_json,
)
from dspy_fst.types import WARM_START, WeightsVersion, version_of

FORMAT = 2
TRAINER = "trainer"
"""Folder of a state that the trainer writes."""
Save = Callable[[Path], None]
"""Writes the new folder that it is given."""
Documents = Mapping[str, object]
"""Name of a file in a state's folder -> its JSON."""
NONE: Documents = {}


class AnotherFormatError(RunDirectoryError):
    """A state that another release wrote: whole, and not to be read here."""


class StateFields(TypedDict, total=False):
    """What a state says of its run. Older releases wrote less; empty before the first state."""

    cycle: int
    """The cycle in progress."""
    searched: int
    """The last cycle that had searched; -1 before any."""
    step: int
    """Updates that were made."""
    moved_at: int
    """Number of steps after which the weights changed last."""
    warm_start: bool
    """Whether the run has made its warm start; left out where it has none, or has it still before it."""
    population: PopulationJson
    judged_by: str
    """Identity of the metric."""
    events_bytes: int
    events_sha256: str
    """Of so many bytes of the events."""


class _StateDocument(TypedDict):
    """state.json without its own checksum."""

    format: int
    fields: StateFields
    files: Mapping[str, FileFacts]


@dataclass(frozen=True)
class RunState:
    """One committed state."""

    path: Path
    fields: StateFields
    files: Mapping[str, FileFacts]
    """Name below the folder -> its facts."""


def commit_state(
    folder: Path,
    fields: StateFields,
    save_trainer: Save | None,
    last: RunState | None,
    documents: Documents | None = None,
    *,
    keep: int,
) -> RunState:
    """Write the next state, then remove all but the ``keep`` newest.

    Args:
        save_trainer: Writes the new folder that it is given. None shares the files of ``last``, which never change.
        documents: Files of this state alone: the next one does not have them.
    """
    number = int(last.path.name) + 1 if last else 0
    scratch = folder / f".{number:06d}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    files: dict[str, FileFacts] = {}
    if save_trainer is not None:
        save_trainer(scratch / TRAINER)
    elif last is not None:
        files = {name: facts for name, facts in last.files.items() if name.startswith(f"{TRAINER}/")}
        for name in files:
            share(last.path / name, scratch / name)
    for name, content in (documents or {}).items():
        write_json(scratch / name, content, indent=None)
    files |= {name: file_facts(scratch / name) for name in _files_in(scratch) if name not in files}
    document: _StateDocument = {"format": FORMAT, "fields": fields, "files": files}
    write_json(scratch / "state.json", {**document, "sha256": _checksum(document)})
    path = folder / f"{number:06d}"
    scratch.rename(path)
    flush(folder)
    prune_states(folder, keep)
    return RunState(path, fields, files)


def prune_states(folder: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest states."""
    for old in _numbered(folder)[:-keep]:
        remove(old.rename(old.with_name(f".{old.name}.old")))  # gone at once, or not at all


def newest_state(folder: Path, *, tidy: bool = True, contents: bool = True) -> RunState | None:
    """The state to resume from; None when there is none.

    Args:
        tidy: Remove what a kill left half written; only for the run that holds the directory.
        contents: Read all of its files; else their sizes count, which takes no time however large they are.

    Raises:
        RunDirectoryError: the newest state is damaged; nothing was changed.
        AnotherFormatError: another release wrote it.
    """
    numbered = _numbered(folder) if folder.is_dir() else []
    if not numbered:
        return None
    state = _verified(numbered[-1], numbered[-2] if len(numbered) > 1 else None, contents)
    for left_over in folder.glob(".*") if tidy else ():
        shutil.rmtree(left_over, ignore_errors=True)
    return state


def peek_state(folder: Path) -> RunState | None:
    """The newest state according to its document, with its other files unread; None when there is none."""
    try:
        path = _numbered(folder)[-1]
        document = _document(path, RunDirectoryError)
        return RunState(path, document["fields"], document["files"])
    except (OSError, IndexError, RunDirectoryError):
        return None


def moved_at(fields: StateFields) -> int:
    """Number of steps after which a state's weights changed last. Older releases published after every step."""
    return fields.get("moved_at", fields.get("step", 0))


def start_version(fields: StateFields) -> WeightsVersion:
    """The weights before the first update: those of the warm start, once it was made."""
    return WARM_START if fields.get("warm_start") else version_of(0)


def version_in(fields: StateFields) -> WeightsVersion:
    """The weights of a state."""
    moved = moved_at(fields)
    return version_of(moved) if moved else start_version(fields)


def to_publish_from(fields: StateFields) -> WeightsVersion:
    """The first version that a run which goes on from this state writes. A warm start's is never written again."""
    moved = moved_at(fields)
    return version_of(moved or int(bool(fields.get("warm_start"))))


def _verified(path: Path, other: Path | None, contents: bool) -> RunState:
    def damaged(what: str) -> RunDirectoryError:
        whole = other is not None and _is_whole(other, contents)
        way_out = f"remove that folder to go on from {other}" if whole else "restore it from a copy"
        return RunDirectoryError(f"{path} is damaged: {what}; {way_out}, or name a new run_dir. Nothing was changed")

    document = _document(path, damaged)
    files = document["files"]
    if differing := sorted({*files}.symmetric_difference(_files_in(path))):
        raise damaged(f"missing or foreign files: {', '.join(differing)}")
    for name, facts in files.items():
        file = path / name
        if file.stat().st_size != facts["bytes"] or (contents and sha256_of(file) != facts["sha256"]):
            raise damaged(f"{name} does not match its checksum")
    return RunState(path, document["fields"], files)


def _document(path: Path, damaged: Callable[[str], RunDirectoryError]) -> _StateDocument:
    document = read_json(path / "state.json")
    if not isinstance(document, dict):
        raise damaged("state.json is missing or no JSON")
    if not isinstance(document.get("format"), int):
        raise damaged("state.json names no format")
    if document.get("format") != FORMAT:
        raise AnotherFormatError(
            f"{path} has format {document.get('format')!r}, this release reads {FORMAT}; go on with the release that "
            "wrote it, or name a new run_dir"
        )
    checksum = document.pop("sha256", None)
    if checksum != _checksum(document):
        raise damaged("state.json does not match its checksum")
    return {"format": FORMAT, "fields": document["fields"], "files": document["files"]}


def _is_whole(path: Path, contents: bool) -> bool:
    try:
        _verified(path, None, contents)
    except RunDirectoryError:
        return False
    return True


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.isdecimal())


def _files_in(path: Path) -> list[str]:
    """Names of the files in a state's folder, without state.json and hidden files that are not a state's."""
    names = (file.relative_to(path) for file in sorted(path.rglob("*")) if not file.is_dir())
    return [str(file) for file in names if str(file) != "state.json" and _belongs(file.name)]


def _belongs(name: str) -> bool:
    """Whether a state wrote it, and not e.g. the file system: NFS leaves hidden files."""
    return name == DCP_METADATA or not name.startswith(".")


def share(there: Path, here: Path) -> None:
    """Give a file a second name; copy it where the file system has no links."""
    here.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(there, here)
    except OSError:
        shutil.copyfile(there, here)
        flush(here)
    flush(here.parent)


def _checksum(document: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
