"""An update that was not applied, because its loss or gradient was not finite: kept for inspection, and counted."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from dspy_fst.errors import NotFiniteError
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.slow.update_metrics import NO_UPDATE
from dspy_fst.types import Batch, UpdateReport


def skipped_update(
    run: RunDirectory, reports: Sequence[StepReport], limit: int, batch: Batch, error: NotFiniteError, name: str
) -> UpdateReport:
    """The report of a skipped update, whose mini-batch is kept in the run's directory.

    Args:
        reports: Of all steps before it.
        limit: ``max_skipped_updates``.
        name: Of the mini-batch's file.

    Raises:
        NotFiniteError: so many updates before it were skipped, too.
    """
    path = run.save_skipped(name, batch)
    in_a_row = sum(1 for _ in takewhile(lambda report: report.update.skipped, reversed(reports)))
    if in_a_row >= limit:
        raise NotFiniteError(
            f"{error}. {in_a_row} updates before this one were skipped for such a cause, so the run "
            f"stops (max_skipped_updates); the batch is in {path}"
        ) from error
    return replace(NO_UPDATE, skipped=f"{error}; the batch is in {path.relative_to(run.path)}")
