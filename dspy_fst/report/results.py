"""What a compiled or loaded program tells of its run, from its record: ``detailed_results`` and ``summary()``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import dspy

from dspy_fst.report.from_directory import read_record
from dspy_fst.report.run_record import RunRecord
from dspy_fst.report.summary import Summary, cycles_table, steps_table, summary_of
from dspy_fst.run.directory import COMPILED, is_run
from dspy_fst.run.phase_reports import CycleReport, StepReport
from dspy_fst.run.validated import Validated


@dataclass(frozen=True)
class CompiledResults:
    """What a run measured, for those who look closer."""

    run_dir: Path
    cycles: tuple[CycleReport, ...]
    """Reports of every cycle of the run, those of earlier processes included."""
    steps: tuple[StepReport, ...]
    validation: Mapping[str, float]
    """Candidate digest -> mean validation score of the state that was returned; empty without a valset. A candidate of
    which no rollout was measured has none."""
    validation_counts: Mapping[str, int] = field(default_factory=dict)
    """``rollouts``, ``repeats``, and the `Outcome.label` of failed and masked rollouts, of the last validation."""
    ending: str = ""
    """What the updates came to, e.g. ``"6 of 6 updates changed the weights"``."""
    validations: tuple[Validated, ...] = ()
    """Every validation of the run: of its start, in between, and of its end."""
    summary: Summary | None = None
    """What ``compiled.summary()`` shows."""

    def __repr__(self) -> str:
        return "\n".join([f"CompiledResults of {self.run_dir}", *self._tables("text")])

    def _repr_html_(self) -> str:
        return "\n".join(self._tables("html"))

    def _tables(self, form: Literal["text", "html"]) -> list[str]:
        whole = [self.summary.text if form == "text" else self.summary._repr_html_()] if self.summary else []
        return [*whole, *(getattr(table, form) for table in (cycles_table(self.cycles), steps_table(self.steps)))]


@dataclass(frozen=True)
class NoResults:
    """In the place of the results of a program whose run is not beside it: a sentence that says why, and what to do."""

    why: str

    def show(self) -> "NoResults":
        """In the place of ``summary()``: print the sentence."""
        print(self)
        return self

    def __repr__(self) -> str:
        return self.why

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(name if name.startswith("__") or name == "why" else f"{name}: {self.why}")


def results_of(record: RunRecord, run_dir: Path) -> CompiledResults:
    """The results of a run."""
    return CompiledResults(
        run_dir=run_dir,
        cycles=record.cycles,
        steps=record.steps,
        validation=record.returned.scores if record.returned else {},
        validation_counts=record.validations[-1].counts if record.validations else {},
        ending=record.ending.words,
        validations=record.validations,
        summary=summary_of(record, run_dir=run_dir),
    )


def results_beside(saved: Path, version: str) -> CompiledResults | NoResults:
    """The results of the run in whose directory a saved program lies.

    Args:
        saved: The program's folder.
        version: Of its weights; a run that ended with others is not its own.
    """
    run_dir = saved.parent
    if saved.name != COMPILED or not is_run(run_dir):
        return NoResults(
            f"{saved} is not inside a run's directory, where a run keeps what it measured; load RUN_DIR/{COMPILED} "
            "instead, or use dspy-fst show RUN_DIR"
        )
    try:
        record = read_record(run_dir, run_dir.name)
        results = results_of(record, run_dir)
    except Exception as error:  # another release, another tool or a broken disk wrote the events
        return NoResults(f"what {run_dir} measured cannot be read: {type(error).__name__}: {error}")
    if record.weights != version:
        return NoResults(f"{run_dir} ended with the weights {record.weights}, and {saved} holds {version}")
    return results


def attach(program: dspy.Module, results: CompiledResults | NoResults, *, detailed: bool = True) -> bool:
    """Put ``detailed_results`` and ``summary`` on a program; False where it has its own ``summary``, which stays."""
    told: dict[str, object] = {"detailed_results": results} if detailed else {}
    ours = isinstance(getattr(getattr(program, "summary", None), "__self__", None), Summary | NoResults)
    free = ours or not hasattr(program, "summary")
    if free:
        shown = results.summary if isinstance(results, CompiledResults) else results
        told["summary"] = shown.show if shown is not None else None
    for name, value in told.items():
        setattr(program, name, value)
    return free
