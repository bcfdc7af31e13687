"""What is wrong with a run's directory, found without changing it: for lists of runs, which no run holds open."""

from pathlib import Path

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.directory import is_run, links_fault, log_fault
from dspy_fst.run.state import AnotherFormatError, newest_state


def damage_in(path: Path) -> str | None:
    """Why `RunDirectory` would refuse to go on with what lies here, as a sentence; None where it would not.

    The files of a trainer's state take gigabytes: here their sizes are looked at, and who goes on reads them all.

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
