"""A run's directory: recipe, events, populations, weights and resumable states.

recipe.json       the settings of the run; only the same recipe continues a directory
events.jsonl      one line an event, appended
search.jsonl      the search in progress: its rollouts and reflections so far (see run/search_journal.py)
populations/      cycle-000.json ...
weights/          step-000000/ ... (Hugging Face folders); LoRA adapters, whose base is base/
states/           000007/ ...: state.json, trainer/; a run resumes from the newest; reusable.json after a search
skipped/          batches whose update was not finite, for inspection
compiled/         the program that compile() returned, for dspy_fst.load and the commands
"""

import hashlib
import json
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock, Timeout

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.files import population_to_json, read_json, remove, to_jsonable, write_json, writing
from dspy_fst.run.recipes import differences
from dspy_fst.run.search_journal import Journal
from dspy_fst.run.state import Documents, Save, StateFields, newest_state, prune_states
from dspy_fst.run.state_writer import StateWriter
from dspy_fst.run.storage import Storage
from dspy_fst.types import WARM_START, Population, WeightsVersion

LOCK = ".lock"
PROJECT = "project.yaml"
"""Written by the command line once the run has been accepted."""
COMPILED = "compiled"
"""The compiled program, saved when compile() ends."""
UNCLAIMED = (LOCK, PROJECT, "recipe.json.new")
"""Files that may be in a directory before a run begins there; a kill at the start leaves the last one."""
VERSION, HALF_WRITTEN = re.compile(r"step-\d+(-warm)?"), re.compile(r"\.(step-\d+|base\.)")
"""Names in weights/ that belong to the run; everything else there is left alone."""
OURS = ("recipe.json", "events.jsonl", "search.jsonl", "populations", "weights", "states", "skipped")
Event: TypeAlias = Mapping[str, Any]
"""One event of a run, as ``events.jsonl`` holds it: its kind under ``"event"``, then the fields of that kind.

E.g. ``{"event": "phase", "time": 1764284400.0, "phase": "cycle 0: searching"}``.
"""
Listener = Callable[[Event], None]


def is_run(path: Path) -> bool:
    """Whether the path is the directory of a run that has begun."""
    return (path / "recipe.json").is_file()


class RunDirectory:
    """One run's files. Rows are appended, documents replaced by rename.

    Args:
        clean: Removes secrets from everything that is written or shown.
        keep_states: How many resumable states are kept.
        defaults: See `directory_fault`.
        storage: Where each state is copied to. What the directory has before it is copied at once.

    Raises:
        RunDirectoryError: the directory holds a run of another recipe, something else, or a damaged state.
    """

    def __init__(
        self,
        path: Path,
        recipe: Mapping[str, object],
        listeners: tuple[Listener, ...] = (),
        *,
        keep_states: int = 2,
        clean: Callable[[object], Any] = lambda value: value,
        defaults: Mapping[str, object] | None = None,
        storage: Storage | None = None,
    ):
        self.path, self.listeners, self._clean = path, listeners, clean
        self._storage = storage
        self._finished: float | None = None
        if fault := directory_fault(path, recipe, defaults):
            raise RunDirectoryError(fault)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / LOCK)
            self._take()
        try:
            self._states = StateWriter(path, newest_state(path / "states"), keep_states, storage)
            self._log_hash = self._checked_log()
            with writing(path):
                write_json(path / "recipe.json", clean(to_jsonable(recipe)))  # first: it makes the directory a run's
                for folder in ("populations", "weights", "states"):
                    (path / folder).mkdir(exist_ok=True)
                prune_states(path / "states", keep_states)  # a kill may have come between a commit and this
                self._forget_uncommitted_events()
            if storage is not None and (newest := self._states.newest) is not None:
                storage.push(path, newest)
        except BaseException:
            self._lock.release()
            raise

    @property
    def state(self) -> StateFields:
        """Fields of the last commit, which is waited for, and which may raise a `DiskError`; empty before the first."""
        return newest.fields if (newest := self._states.newest) else {}

    @property
    def trainer_state(self) -> Path:
        """The trainer's folder in the committed state."""
        if (newest := self._states.newest) is None:
            raise RunDirectoryError(f"{self.path}: nothing was committed yet")
        return newest.path / "trainer"

    @property
    def finished(self) -> dict[str, float]:
        """When the run was finished before it was opened, as the ``time`` of an event; empty where it was not, or where
        it has gone on since."""
        return {} if self._finished is None else {"time": self._finished}

    def _take(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"run_dir={str(self.path)!r} is in use by another run; wait for it or name another"
            ) from None

    # ---- events --------------------------------------------------------------------------------

    def emit(self, kind: str, **fields: object) -> None:
        """Append one event and show it to the listeners."""
        event = self._clean({"event": kind, "time": time.time(), **to_jsonable(fields)})
        line = (json.dumps(event, allow_nan=False) + "\n").encode()
        with writing(self.path), (self.path / "events.jsonl").open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._log_hash.update(line)
        self._show(event)

    def tell(self, event: Event) -> None:
        """Show an event to the listeners without writing it to the disk."""
        self._show(self._clean(event))

    def _show(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def events(self) -> list[Event]:
        """Every event so far."""
        return read_events(self.path)

    # ---- the resumable state -------------------------------------------------------------------

    def document(self, name: str) -> Any:
        """A document of the newest state; None where it has none of this name."""
        return read_json(newest.path / name) if (newest := self._states.newest) and name in newest.files else None

    def commit(
        self, save_trainer: Save | None, documents: Documents | None = None, *, wait: bool = True, **fields: object
    ) -> threading.Event:
        """Add a state with the trainer, these documents and fields, and the current length of the events.

        Args:
            save_trainer: Writes the trainer's part into a new folder; None when the trainer has not moved since
                the last commit, whose files are then shared.
            wait: Until it is on the disk; else see `StateWriter.write` for what is returned, and for errors of before.
        """
        for text in self._storage.take_warnings() if self._storage else ():
            self.emit("warning", step=fields.get("step", 0), text=text)
        log = self.path / "events.jsonl"
        state: StateFields = {
            **self._clean(to_jsonable(fields)),
            "events_bytes": log.stat().st_size if log.exists() else 0,
            "events_sha256": self._log_hash.hexdigest(),
        }
        self._finished = None
        written = self._states.write(state, save_trainer, self._clean(to_jsonable(documents or {})))
        if wait:
            _ = self._states.newest
        return written

    def abandon(self) -> None:
        """Remove everything if nothing was committed yet, so that a corrected recipe can use the directory."""
        try:
            if not self.state:
                for name in reversed(OURS):  # the recipe last: until then a kill leaves the directory of a run
                    remove(self.path / name)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Let others open the directory. A search journal that a kill left is removed: an ended run has no search."""
        try:
            _ = self._states.newest
            remove(self.path / "search.jsonl")
        finally:
            self._lock.release()

    def _checked_log(self) -> "hashlib._Hash":
        """The hash of the committed events, after a check that they are what was committed."""
        log = self.path / "events.jsonl"
        content = log.read_bytes() if log.is_file() else b""
        if fault := log_fault(self.path, self.state, content):
            raise RunDirectoryError(fault)
        return hashlib.sha256(content[: int(self.state.get("events_bytes", 0))])

    def _forget_uncommitted_events(self) -> None:
        """Cut the events after the last commit: the resumed run makes them again."""
        log = self.path / "events.jsonl"
        if log.exists():
            committed = int(self.state.get("events_bytes", 0))
            ends = [event["time"] for event in _parsed(log.read_bytes()[committed:]) if event.get("event") == "done"]
            self._finished = ends[-1] if ends else None
            os.truncate(log, committed)

    # ---- the search in progress -----------------------------------------------------------------

    def open_search(self, cycle: int, conditions: Mapping[str, object] | None = None) -> Journal:
        """The journal of this cycle's search, with the entries that a killed run made under the same conditions.

        Raises:
            RunDirectoryError: the journal is damaged.
        """
        # The hash of the events belongs to this run alone, so a journal copied from another run is not accepted.
        head = {"cycle": cycle, "after": self.state.get("events_sha256")}
        with writing(self.path):
            return Journal(self.path / "search.jsonl", head, self._clean, conditions)

    # ---- populations, weights, skipped batches -------------------------------------------------

    def save_population(self, cycle: int, population: Population) -> None:
        with writing(self.path):
            write_json(self.path / "populations" / f"cycle-{cycle:03d}.json", population_to_json(population))

    def save_skipped(self, name: str, batch: object) -> Path:
        """Keep a batch whose update was skipped. Its numbers may be NaN or Infinity, as Python writes them."""
        path = self.path / "skipped" / f"{name}.json"
        with self.writing():
            path.parent.mkdir(exist_ok=True)
            write_json(path, batch, finite=False)
        return path

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A block that writes into the directory; a full or read-only disk becomes a `DiskError`."""
        with writing(self.path):
            yield

    def weights_path(self, version: WeightsVersion) -> Path:
        return self.path / "weights" / version

    def drop_weights_from(self, version: WeightsVersion) -> None:
        """Remove this version, later ones and incomplete ones: the resumed run publishes them again."""
        with self.writing():
            for path in (self.path / "weights").iterdir():
                if HALF_WRITTEN.match(path.name) or (VERSION.fullmatch(path.name) and path.name >= version):
                    remove(path)

    def prune_weights(self, keep: int, best: Collection[WeightsVersion] = ()) -> None:
        """Remove all but the first, those of a warm start, the best and the ``keep`` newest versions."""
        versions = sorted(path for path in (self.path / "weights").iterdir() if VERSION.fullmatch(path.name))
        for path in versions[1:-keep]:
            if path.name not in {*best, WARM_START}:
                remove(path.rename(path.with_name(f".{path.name}.old")))  # gone at once, or not at all


def log_fault(path: Path, state: StateFields, content: bytes) -> str | None:
    """Why these events differ from what was committed with the newest state, as a sentence; None when they do not.

    Args:
        path: The run's directory.
        state: The state's fields; empty without a state.
        content: Contents of events.jsonl; empty without such a file.
    """
    if not state:
        done = _committed_work(content)
        return done and (
            f"run_dir={str(path)!r}: {done}, but states/ holds nothing to go on from; restore states/ from a copy, or "
            "name a new directory"
        )
    committed = int(state.get("events_bytes", 0))
    if len(content) >= committed and hashlib.sha256(content[:committed]).hexdigest() == state["events_sha256"]:
        return None
    return (
        f"run_dir={str(path)!r}: events.jsonl is not what was committed (its first {committed} bytes were changed or "
        "are missing); restore it from a copy, or name a new directory"
    )


def links_fault(path: Path) -> str | None:
    """A sentence when files of the directory are links; None when none are."""
    links = sorted(entry.name for entry in path.iterdir() if entry.is_symlink() and entry.name in OURS)
    return f"run_dir={str(path)!r}: {', '.join(links)} {_LEADS_ELSEWHERE}" if links else None


_LEADS_ELSEWHERE = (
    "leads elsewhere, and a run never writes outside its directory; move it back to its place, or name a new directory"
)


def run_around(path: Path) -> Path | None:
    """The run whose directory contains the path; None when there is none."""
    return next((folder for folder in path.parents if is_run(folder) and (folder / "states").is_dir()), None)


def directory_fault(
    path: Path, recipe: Mapping[str, object], defaults: Mapping[str, object] | None = None
) -> str | None:
    """Why a run of this recipe cannot use this directory, as a sentence; None when it can.

    Args:
        defaults: The default of every setting. One that the directory's recipe lacks had it there: older releases had
            fewer settings.
    """
    if path.exists() and not path.is_dir():
        return f"run_dir={str(path)!r} is a file; name a directory"
    if not is_run(path) and (around := run_around(path)):
        return (
            f"run_dir={str(path)!r} lies in the directory of another run, {around}, in which no other is looked for; "
            f"name one outside of it, e.g. {str(around.parent / path.name)!r}"
        )
    if not path.exists() or all(entry.name in UNCLAIMED for entry in path.iterdir()):
        return None
    if fault := links_fault(path):
        return fault
    recorded = read_json(path / "recipe.json")
    if not isinstance(recorded, Mapping):
        return f"run_dir={str(path)!r} is not empty and holds no readable recipe.json; name a new directory"
    wanted = to_jsonable(recipe)
    differing = differences(recorded, wanted, to_jsonable(defaults or {}))
    if differing:
        return (
            f"run_dir={str(path)!r} holds a run of another configuration: {'; '.join(differing)}. "
            "Name a new directory, or go back to that configuration to continue it"
            f"{_more_cycles(path, recorded, wanted)}"
        )
    return None


def _more_cycles(path: Path, recorded: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """Advice for a user who seems to want more cycles from this run's result; empty for others."""
    goes_on = wanted.get("population") is not None and recorded.get("population") != wanted.get("population")
    if not goes_on and recorded.get("cycles") == wanted.get("cycles"):
        return ""
    return (
        ". More cycles are a run of their own, from this one's result: FSTOptimizer(run_dir=NEW, ...).compile("
        f"compiled, ...), where compiled may be dspy_fst.load({str(path / COMPILED)!r}, program); or dspy-fst run FILE "
        f"--continue-from {shlex.quote(str(path))} --run-dir NEW"
    )


def _committed_work(log: bytes) -> str | None:
    """Searches and updates in the events, which only a run with a committed state can have made; None without any."""
    kinds = [event.get("event") for event in _parsed(log)]
    done = {name: kinds.count(kind) for name, kind in (("searches", "cycle"), ("updates", "step"))}
    return (
        f"events.jsonl tells of {done['searches']} searches and {done['updates']} updates"
        if any(done.values())
        else None
    )


def read_events(path: Path) -> list[Event]:
    """The events of a run directory, also of a running or killed run. Incomplete lines are left out."""
    log = path / "events.jsonl"
    return _parsed(log.read_bytes()) if log.is_file() else []


def _parsed(log: bytes) -> list[Event]:
    events: list[Event] = []
    for line in log.split(b"\n")[:-1]:
        with suppress(ValueError):
            if isinstance(event := json.loads(line), dict):
                events.append(event)
    return events
