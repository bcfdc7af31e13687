"""Run directories -> run records. Reads only: a run that goes on is not disturbed."""

import fcntl
from collections.abc import Sequence
from pathlib import Path

from dspy_fst.errors import RunDirectoryError
from dspy_fst.report.from_events import record_of
from dspy_fst.report.run_record import RunRecord
from dspy_fst.run.directory import LOCK, Event, read_events


def read_records(run_dirs: Sequence[str | Path]) -> list[RunRecord]:
    """The records of these runs, under names that tell them apart.

    Raises:
        RunDirectoryError: one of them is not the directory of a run.
    """
    if not run_dirs:
        raise ValueError("run_dirs is empty; name the directory of at least one run")
    paths = [Path(run_dir) for run_dir in run_dirs]
    return [read_record(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_record(path: Path, name: str, events: Sequence[Event] | None = None) -> RunRecord:
    """The record of one run.

    Args:
        events: The run's events, where the caller has read them already.

    Raises:
        RunDirectoryError: it is not the directory of a run.
    """
    if not any((path / file).is_file() for file in ("events.jsonl", "recipe.json")):
        raise RunDirectoryError(f"{path} is not the directory of a run: it holds neither events.jsonl nor recipe.json")
    evaluations = path / "evaluations.jsonl"
    lines = evaluations.read_text("utf-8", "replace").splitlines() if evaluations.is_file() else []
    events = read_events(path) if events is None else events
    return record_of(events, name=name, evaluations=lines, in_use=_in_use(path))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that differ. A path that is given twice gets its position as well."""
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]


def _in_use(path: Path) -> bool:
    """Whether a process holds the run's lock now.

    The run's own lock is exclusive. This asks for a shared lock and releases it at once.
    """
    try:
        with (path / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock file, or the file system has no locks
        return False
    return False
