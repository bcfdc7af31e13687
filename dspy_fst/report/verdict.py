"""Start against end: what a run's validations say, in a sentence and as a table. Every front end shows these."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dspy_fst.formatting.numbers import DASH, interval, number, signed
from dspy_fst.formatting.tables import TextTable
from dspy_fst.report.run_record import RunRecord, best
from dspy_fst.run.paired import INTERVAL, Difference
from dspy_fst.run.validated import Validated, best_of, gain

NOT_VALIDATED = "not validated"
CHOSEN = "the best of several candidates was chosen by these problems, which favours it"


def verdict(record: RunRecord) -> str:
    """Where the run started and where it ended, with the interval of the difference, and which state is returned.

    A run that goes on is told as far as it has come. Older releases did not validate the start.
    """
    newest = record.validations[-1] if record.validations else None
    if newest is None:
        known = best([node.validation for node in record.nodes])
        return NOT_VALIDATED if known is None else f"start {NOT_VALIDATED}, end {number(known)}"
    start = record.start_validated
    parts = [f"start {NOT_VALIDATED if start is None else number(start.score)}"]
    if newest is not start:
        parts.append(f"{'end' if newest.when == 'end' else newest.where} {number(newest.score)}")
        if start is not None:
            parts.append(told(gain(start, newest), chosen_from=len(newest.candidates)))
        top = best_of([state for state in record.validations if state.terms == newest.terms])
        if top is not None and top is not start and not top.same_as(newest):
            parts.append(f"best {number(top.score)} {top.where} (chosen by them too)")
    if record.returned is not None and record.returned.when != "end":
        parts.append(f"returned: the state {record.returned.where}")
    return ", ".join(parts)


def in_a_line(states: Sequence[Validated]) -> str:
    """The newest of a run's validations so far, beside the start."""
    now = states[-1]
    start = next((state for state in states if state.when == "start" and state.terms == now.terms), None)
    line = f"validation {now.where}: {number(now.score)}"
    if start is None or start is now:
        return line
    by = told(gain(start, now), chosen_from=len(now.candidates))
    return f"{line}, against {number(start.score)} at the start: {by}"


def told(by: Difference | None, *, chosen_from: int = 1) -> str:
    """A difference, how sure it is, and what favours it.

    >>> told(Difference(0.16, 0.05, 0.27, 64))
    '+0.160 (95% interval 0.050 to 0.270, 64 problems)'
    >>> told(Difference(0.5, None, None, 1), chosen_from=4)
    '+0.500 (one problem, so no interval; the best of 4 by these problems, so favoured)'

    Args:
        chosen_from: Candidates of which the problems themselves chose the measured one.
    """
    if by is None:
        return "not comparable"
    favoured = f"; the best of {chosen_from} by these problems, so favoured" if chosen_from > 1 else ""
    return f"{signed(by.mean)} ({by.words}{favoured})"


def validations_table(record: RunRecord) -> TextTable:
    """Every validation, and its difference to the start."""
    rows = [_row(state, record) for state in record.validations]
    title = f"Validations ({INTERVAL}; {CHOSEN})"
    columns = ("state", "weights", "score", "rollouts", "difference to the start", "interval")
    return TextTable(title, columns, rows, words=2)


def _row(state: Validated, record: RunRecord) -> list[str]:
    start = record.start_validated
    by = None if start is None or state is start else gain(start, state)
    marked = " (returned)" if state is record.returned else ""
    return [
        state.where + marked,
        state.weights,
        number(state.score),
        f"{state.counts.get('rollouts', 0):,}",
        signed(by.mean) if by else DASH,
        interval(by.low, by.high) if by else DASH,
    ]


def validation_told(record: RunRecord, state: Validated) -> dict[str, Any]:
    """A validation as JSON: what the table shows, and the candidates' scores."""
    start = record.start_validated
    by = None if start is None or state is start else gain(start, state)
    fields = ("index", "when", "step", "weights", "score", "sampled_tokens", "seconds")
    return {
        **{name: getattr(state, name) for name in fields},
        "scores": dict(state.scores),
        "counts": dict(state.counts),
        "gain": None if by is None else asdict(by),
    }
