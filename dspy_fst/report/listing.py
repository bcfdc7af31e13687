"""The runs below a folder, from their directories alone.

A folder may hold anything, and what is not a run is skipped. A run that cannot be read is listed with the reason. So is
a run that could not be continued, because something in its directory is damaged or missing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dspy_fst.errors import RunDirectoryError
from dspy_fst.report.from_directory import read_record
from dspy_fst.report.run_record import RunRecord, best
from dspy_fst.run.directory import Event, is_run, links_fault, log_fault, read_events
from dspy_fst.run.ending import halt_reason_in
from dspy_fst.run.files import read_json
from dspy_fst.run.state import AnotherFormatError, newest_state, peek_state

State = Literal["running", "finished", "stopped", "damaged", "unreadable"]
NOT_ENTERED = {"__pycache__", "node_modules", "site-packages"}
"""Large folders without runs. Hidden folders are not entered either."""


@dataclass(frozen=True)
class Listed:
    """One run's directory."""

    path: Path
    state: State
    why: str | None = None
    """Why it stopped or ended early, what is damaged, or why it cannot be read; None where nothing is known."""
    resumable: bool = False
    """Whether it has a saved state, and steps of its plan are left."""
    setting: str | None = None
    """The setting that ended it early. The run goes on only with a higher value."""
    unmoved: str | None = None
    """Why no update changed the weights, if steps were made and none did; the same words as the run's last line."""
    steps: int = 0
    planned: int | None = None
    recipe: str = ""
    """The recipe, the program and the model, in short."""
    measured: Literal["validation", "reward"] | None = None
    """``start`` and ``end`` are the best candidate's validation scores, or mean rewards of the first and last step."""
    start: float | None = None
    end: float | None = None
    rollouts: int = 0
    tokens: int = 0
    """Sampled tokens. Like the rollouts, without those of validations."""
    hours: float = 0.0
    """From the first event to the last, pauses included."""
    dollars: float | None = None
    """Cost of the reflection LM's calls with a known price; None without any."""
    unpriced: int = 0
    """Calls of the reflection LM without a known price."""
    last: float | None = None
    """Time of the last event, in seconds since 1970."""


@dataclass
class Listing:
    """The runs of a folder."""

    runs: list[Listed] = field(default_factory=list)
    """The newest first."""
    closed: list[str] = field(default_factory=list)
    """Folders that could not be read, each with the reason."""


def list_runs(folder: Path) -> Listing:
    """Every run at or below the folder. Links are not followed, and the folders inside a run are not searched."""
    listing = Listing()
    listing.runs = sorted(map(_listed, _found(folder, listing.closed)), key=lambda run: -(run.last or 0.0))
    return listing


def _found(folder: Path, closed: list[str]) -> Iterator[Path]:
    def note(error: OSError) -> None:
        closed.append(f"{error.filename}: {error.strerror}")

    for path, below, files in os.walk(folder, onerror=note):
        if _is_run(Path(path), files):
            below.clear()
            yield Path(path)
        below[:] = sorted(name for name in below if name not in NOT_ENTERED and not name.startswith("."))


def _is_run(path: Path, files: Sequence[str]) -> bool:
    """Whether a run began here. Some of its files may be missing, so most of what only runs have must be present."""
    files_of_run = [name for name in ("recipe.json", "events.jsonl") if name in files]
    folders = sum((path / name).is_dir() for name in ("states", "weights", "populations"))
    return bool(files_of_run) and len(files_of_run) + folders > 2


def _listed(path: Path) -> Listed:
    try:
        events = read_events(path)
        run = _run(path, read_record(path, path.name, events), events)
        damage = None if run.state in ("running", "unreadable") else damage_in(path)
        return replace(run, state="damaged", why=damage, resumable=False, setting=None) if damage else run
    except Exception as error:  # another release, another tool or a broken disk may have written it
        return Listed(path, "unreadable", f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])


def _run(path: Path, record: RunRecord, events: Sequence[Event]) -> Listed:
    recipe = read_json(path / "recipe.json") if is_run(path) else {}
    if not isinstance(recipe, Mapping):
        return Listed(path, "unreadable", "recipe.json holds no recipe")
    early = record.ended is not None and record.ended.early
    why = record.ended.text if record.ended and early else halt_reason_in(events)
    measured, start, end = _scores(record)
    return Listed(
        path=path,
        state=record.state,
        why=None if record.state == "running" else why,
        resumable=(record.state == "stopped" and peek_state(path / "states") is not None) or early,
        setting=record.ended.setting if record.ended else None,
        unmoved=record.ending.words if record.ending.nothing_learned else None,
        steps=len(record.steps),
        planned=record.budget.get("updates"),
        recipe=_recipe(recipe, next((event for event in events if event.get("event") == "plan"), {})),
        measured=measured,
        start=start,
        end=end,
        rollouts=record.costs.rollouts,
        tokens=record.costs.tokens,
        hours=((record.last or 0.0) - (record.started or 0.0)) / 3600,
        dollars=record.costs.reflection_lm.dollars,
        unpriced=record.costs.reflection_lm.unpriced,
        last=record.last,
    )


def _recipe(recipe: Mapping[str, object], plan: Event) -> str:
    """E.g. ``fst 8x6 steps of 32x8, K=4, lr 1e-06, Triage on Qwen3-0.6B``: cycles x steps of problems x rollouts."""
    steps = f"{recipe.get('cycles', '?')}x{recipe.get('steps_per_cycle', '?')} steps"
    batch = f"{recipe.get('problems_per_step', '?')}x{recipe.get('group_size', '?')}"
    rate = recipe.get("learning_rate")
    words = [
        f"{recipe.get('method', '?')} {steps} of {batch}",
        f"K={recipe.get('population_size', '?')}",
        f"lr {rate:g}" if isinstance(rate, int | float) else "lr ?",
        f"{plan.get('program', 'a program')} on {Path(str(plan.get('model') or recipe.get('model'))).name}",
    ]
    return ", ".join(words)


def _scores(record: RunRecord) -> tuple[Literal["validation", "reward"] | None, float | None, float | None]:
    """What the scores are, the score of the start, and the score of the end.

    The end is the returned state, or the newest state while none is returned. The start may not have been validated.
    """
    shown = record.returned or (record.validations[-1] if record.validations else None)
    if shown is not None:
        start = record.start_validated
        return "validation", None if start is None else start.score, shown.score
    if (known := best([node.validation for node in record.nodes])) is not None:  # earlier releases
        return "validation", None, known
    rewards = record.rewards
    return ("reward", rewards[0], rewards[-1]) if rewards else (None, None, None)


# ---- damage --------------------------------------------------------------------------------------


def damage_in(path: Path) -> str | None:
    """Why `RunDirectory` would refuse to continue this run, as a sentence; None when it would not.

    The files of a trainer's state take gigabytes. Here only their sizes are checked; a run that continues reads them.

    Raises:
        AnotherFormatError: another release wrote the state.
    """
    if not is_run(path):
        return f"{path}: recipe.json is missing; restore it from a copy, or name a new directory"
    if fault := links_fault(path):
        return fault
    try:
        state = newest_state(path / "states", tidy=False, contents=False)
    except AnotherFormatError:
        raise
    except RunDirectoryError as error:
        return str(error)
    log = path / "events.jsonl"
    return log_fault(path, state.fields if state else {}, log.read_bytes() if log.is_file() else b"")
