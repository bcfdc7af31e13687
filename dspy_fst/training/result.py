"""A compiled program: the user's own program class, speaking evolved instructions with trained weights.

On it: ``population`` (Population), ``candidate_programs`` (``[{"score", "program"}]``, best first),
``detailed_results`` (CompiledResults), ``summary()`` (prints and returns a Summary) and ``_compiled``. Its PolicyLM is
the trained one, on a running engine, and it speaks through the adapter of its training whatever DSPy is set to
(`dspy_fst.rollout.chat_adapters`).

It is kept in its run's directory, where serve, eval, export and whoever goes on from it find it:

    run_dir/compiled/    what `dspy_fst.save` writes; the weights are the run's own files under a second name

A run that was stopped and continued ends with another program: its folder takes the place of the earlier one.
"""

from pathlib import Path

import dspy

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import RunDirectoryError
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_events import record_of
from dspy_fst.report.results import CompiledResults, attach, results_of
from dspy_fst.rollout.chat_adapters import adapter_in_force, keep, kept_by
from dspy_fst.rollout.components import carry, with_texts
from dspy_fst.run.directory import COMPILED
from dspy_fst.run.files import flush, read_json, remove, to_jsonable, writing
from dspy_fst.run.state import share
from dspy_fst.run.validated import Validated, best_of
from dspy_fst.saving.format import PROGRAM, WEIGHTS, is_saved
from dspy_fst.saving.program_state import written_state
from dspy_fst.saving.save_load import documents_of, written_beside
from dspy_fst.training.session import Session
from dspy_fst.training.what_helps import end_alternation
from dspy_fst.types import Population, version_of

__all__ = ["CompiledResults", "compiled_program", "keep_compiled", "start_of"]

OWN_SUMMARY = (
    "the program has a `summary` of its own, which stays; that of the run is compiled.detailed_results.summary, and "
    "dspy-fst show RUN_DIR prints it"
)


def compiled_program(run: Session, population: Population, *, track_stats: bool = True) -> dspy.Module:
    """The program that a run ends with, or the best of its validated states where ``return_best`` asks for it.

    Raises:
        NothingLearnedError: it stopped because no update changed the weights, and not because all was solved.
    """
    end_alternation(run)
    end = run.validate_end(population)
    returned = _returned(run, end)
    if returned is not None and returned.scores:
        population = returned.ranked
    compiled = with_texts(run.program, population.best)
    keep(compiled, kept_by(compiled) or adapter_in_force())
    carry(compiled, population)
    run.tell_end()
    run.run.emit(
        "done",
        population=population,
        validation=returned.scores if returned else {},
        validation_counts=end.counts if end else {},
        weights=run.policy.checkpoint.version,
        ending=run.observer.ending.words,
        returned=None if returned is None else returned.index,
        **run.run.finished,
    )
    _attach(compiled, run, track_stats=track_stats)
    return compiled


def _returned(run: Session, end: Validated | None) -> Validated | None:
    """The state that is returned, its weights served; the end unless ``return_best`` finds a better one."""
    best = best_of(run.validation.states) if run.config.return_best else end
    if best is None or end is None or best.same_as(end):
        return end
    run.serve_validated(best)
    run.run.emit("note", text=f"return_best: {best.in_words} is returned, and not {end.in_words}")
    return best


def _attach(compiled: dspy.Module, run: Session, *, track_stats: bool) -> None:
    """``detailed_results`` and ``summary``; a program's own attribute of that name stays."""
    record = record_of(run.run.events(), name=run.run.path.name)
    if not attach(compiled, results_of(record, run.run.path), detailed=track_stats):
        run.recorder.note(OWN_SUMMARY)


def start_of(compiled: dspy.Module) -> Checkpoint:
    """The weights that the program's run started from, kept in its run directory."""
    version = version_of(0)
    path = policy_of(compiled).checkpoint.folder.parent / version
    if not path.is_dir():
        raise ValueError(f"the weights that training started from are not at {path}; they stay in the run directory")
    return Checkpoint.at(version, path)


# ---- kept in the run's directory -----------------------------------------------------------------


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
