"""The compiled program in its run's directory: there serve, eval, export and whoever goes on from it find it.

    run_dir/compiled/    what `dspy_fst.save` writes; the weights are the run's own files under a second name

A run that was stopped and continued ends with another program: its folder takes the place of the earlier one.
"""

from pathlib import Path

import dspy

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.directory import COMPILED
from dspy_fst.run.files import flush, read_json, remove, to_jsonable, writing
from dspy_fst.run.state import share
from dspy_fst.saving.format import PROGRAM, WEIGHTS, is_saved
from dspy_fst.saving.program_state import written_state
from dspy_fst.saving.save_load import documents_of, written_beside
from dspy_fst.training.session import Session


def keep_compiled(compiled: dspy.Module, run: Session) -> None:
    """Save the program in the run's directory, unless it lies there already.

    A program that cannot be saved is told as a warning of the run, with the reason, and given back all the same: it may
    have cost days.
    """
    try:
        save_in(run.run.path, compiled)
    except Exception as error:  # a program's own state may refuse in any way to be written
        text = f"the compiled program is not kept in {run.run.path / COMPILED}: {' '.join(str(error).split())}"
        run.run.emit("warning", step=run.run.state.get("step", 0), text=text)


def save_in(run_dir: Path, compiled: dspy.Module) -> Path:
    """Save a program as the one that the run ended with.

    Raises:
        ValueError: one of its texts holds a secret.
        RunDirectoryError: something else lies in its place, or it could not be loaded again.
        DiskError: the disk refused.
    """
    path = run_dir / COMPILED
    if _holds(path, compiled):
        return path
    if path.exists() and not is_saved(path):
        raise RunDirectoryError(f"{path} is no saved program and is left alone; move it away")
    with writing(path):
        for left_over in run_dir.glob(f".{COMPILED}.*"):  # by a kill
            remove(left_over)
        with written_beside(path, compiled, copy=_shared) as scratch:
            if path.exists():  # a kill between the two renames leaves none, and the next compile() writes it again
                path.rename(path.with_name(f".{COMPILED}.old"))
            scratch.rename(path)
            flush(run_dir)
        remove(run_dir / f".{COMPILED}.old")
    return path


def _holds(path: Path, compiled: dspy.Module) -> bool:
    """Whether this program was saved there: the same texts, population, weights and settings."""
    wanted = {**documents_of(compiled), PROGRAM: written_state(compiled)}
    whole = (path / WEIGHTS).is_dir() and (path / "manifest.json").is_file()
    return whole and all(read_json(path / name) == to_jsonable(document) for name, document in wanted.items())


def _shared(there: str, here: str) -> None:
    """The run's file under a second name: like all published weights it is never changed, and takes no more room."""
    share(Path(there), Path(here))
