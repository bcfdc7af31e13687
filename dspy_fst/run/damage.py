"""Damage of a run's directory, found without changing the directory: for lists of runs."""

from pathlib import Path

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.directory import is_run, links_fault, log_fault
from dspy_fst.run.state import AnotherFormatError, newest_state


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
