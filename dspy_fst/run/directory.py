"""What lasts of a run: a directory with the recipe, events, populations, weights and one resumable state.

recipe.json       what was asked for; a directory is only continued by the same recipe
events.jsonl      one line an event, appended
populations/      cycle-000.json ...
weights/          step-000000/ ... (Hugging Face folders)
state/            the last committed state: state.json, trainer/
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dspy_fst.errors import RunDirectoryError
from dspy_fst.types import Candidate, Population

LOCK = ".lock"
Listener = Callable[[Mapping[str, Any]], None]


class RunDirectory:
    """One run's files. Rows are appended, documents replaced by rename.

    Raises:
        RunDirectoryError: the directory holds a run of another recipe, or something else.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any], listeners: tuple[Listener, ...] = ()):
        self.path, self._listeners = path, listeners
        if fault := directory_fault(path, recipe):
            raise RunDirectoryError(fault)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"run_dir={str(path)!r} is in use by another run; wait for it or name another"
            ) from None
        for folder in ("populations", "weights"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        write_json(path / "recipe.json", recipe)
        self.state: dict[str, Any] = self._read_state()
        self._forget_uncommitted_events()

    # ---- events --------------------------------------------------------------------------------

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event and show it to the listeners."""
        event = {"event": kind, "time": time.time(), **{key: plain(value) for key, value in fields.items()}}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.tell(event)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Show something to the listeners that is not worth a line on disk."""
        for listener in self._listeners:
            listener(event)

    def events(self) -> list[dict[str, Any]]:
        """Every event so far."""
        return read_events(self.path)

    # ---- the resumable state -------------------------------------------------------------------

    def commit(self, save_trainer: Callable[[Path], None], **state: Any) -> None:
        """Replace the state by one that holds the trainer, these fields and the place in the events."""
        fresh, old = self.path / "state.new", self.path / "state.old"
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)
        fresh.mkdir()
        save_trainer(fresh / "trainer")
        log = self.path / "events.jsonl"
        fields = {key: plain(value) for key, value in state.items()}
        self.state = {**fields, "events_bytes": log.stat().st_size if log.exists() else 0}
        write_json(fresh / "state.json", self.state)
        current = self.path / "state"
        if current.exists():
            current.rename(old)
        fresh.rename(current)
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        """Remove what was written, if nothing was committed yet: the directory is free for a corrected recipe."""
        if not self.state:
            for name in ("populations", "weights"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("recipe.json", "events.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        self._lock.release()

    def close(self) -> None:
        """Let others open the directory."""
        self._lock.release()

    def _read_state(self) -> dict[str, Any]:
        current, old = self.path / "state", self.path / "state.old"
        if not current.exists() and old.exists():  # killed between the two renames of a commit
            old.rename(current)
        if not (current / "state.json").exists():
            return {}
        state: dict[str, Any] = json.loads((current / "state.json").read_text())
        return state

    def _forget_uncommitted_events(self) -> None:
        """Cut the events that came after the last commit: the resumed run will make them again."""
        log = self.path / "events.jsonl"
        if log.exists():
            os.truncate(log, min(self.state.get("events_bytes", 0), log.stat().st_size))

    # ---- populations and weights ---------------------------------------------------------------

    def save_population(self, cycle: int, population: Population) -> None:
        write_json(self.path / "populations" / f"cycle-{cycle:03d}.json", population_to_json(population))

    def weights_path(self, version: str) -> Path:
        return self.path / "weights" / version

    def drop_weights_from(self, version: str) -> None:
        """Remove this version, later ones and what a kill left half written: the resumed run publishes them again."""
        for path in (self.path / "weights").iterdir():
            if path.name.startswith(".") or path.name >= version:
                shutil.rmtree(path)

    def prune_weights(self, keep: int) -> None:
        """Remove all but the first and the ``keep`` newest versions."""
        versions = sorted((self.path / "weights").glob("step-*"))
        for path in versions[1:-keep]:
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))  # gone at once, or not at all


def directory_fault(path: Path, recipe: Mapping[str, Any]) -> str | None:
    """Why a run of this recipe cannot live here, as a sentence; None when it can."""
    if path.exists() and not path.is_dir():
        return f"run_dir={str(path)!r} is a file; name a directory"
    if not path.exists() or all(entry.name == LOCK for entry in path.iterdir()):
        return None
    try:
        found = json.loads((path / "recipe.json").read_text())
    except (OSError, ValueError):
        return f"run_dir={str(path)!r} is not empty and holds no readable recipe.json; name a new directory"
    wanted = plain(recipe)
    differing = [
        f"{key} (there {found.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        return (
            f"run_dir={str(path)!r} holds a run of another configuration: {'; '.join(differing)}. "
            "Name a new directory, or go back to that configuration to continue it"
        )
    return None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run directory, also of a running or a killed run (a torn last line is left out)."""
    log = path / "events.jsonl"
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def population_to_json(population: Population) -> dict[str, Any]:
    """Plain data of a population; `population_from_json` turns it back."""
    return {
        "members": [dict(member.texts) for member in population.members],
        "scores": list(population.scores),
        "parents": {digest: list(of) for digest, of in population.parents.items()},
    }


def population_from_json(data: Mapping[str, Any]) -> Population:
    return Population(
        members=tuple(Candidate(texts) for texts in data["members"]),
        scores=tuple(data["scores"]),
        parents={digest: tuple(of) for digest, of in data["parents"].items()},
    )


def write_json(path: Path, data: Any) -> None:
    """Write a document so that a reader finds the old one or the new one, never half of either."""
    partial = path.with_name(path.name + ".new")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(plain(data), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def plain(value: Any) -> Any:
    """JSON's types of our types."""
    if isinstance(value, Population):
        return population_to_json(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
