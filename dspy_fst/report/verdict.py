"""The end of a run against its start, by its validations: in a sentence and as a table. Every front end shows these."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TypedDict

from dspy_fst.formatting.numbers import DASH, interval, number, signed
from dspy_fst.formatting.tables import TextTable
from dspy_fst.report.run_record import RunRecord, best
from dspy_fst.run.paired import INTERVAL, Difference
from dspy_fst.run.validated import Validated, best_of, gain

NOT_VALIDATED = "not validated"
CHOSEN = "the best of several candidates was chosen by these problems, which favours it"


def verdict(record: RunRecord) -> str:
    """The score of the start, of the end and of the best state, their difference, and which state is returned.

    For a run that goes on, the newest validation stands for the end. Older releases did not validate the start.
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
            parts.append(difference_words(gain(start, newest), chosen_from=len(newest.candidates)))
        top = best_of([state for state in record.validations if state.terms == newest.terms])
        if top is not None and top is not start and not top.same_as(newest):
            parts.append(f"best {number(top.score)} {top.where} (chosen by them too)")
    if record.returned is not None and record.returned.when != "end":
        parts.append(f"returned: the state {record.returned.where}")
    return ", ".join(parts)


def validation_line(states: Sequence[Validated]) -> str:
    """The newest validation so far, compared with the start."""
    now = states[-1]
    start = next((state for state in states if state.when == "start" and state.terms == now.terms), None)
    line = f"validation {now.where}: {number(now.score)}"
    if start is None or start is now:
        return line
    difference = difference_words(gain(start, now), chosen_from=len(now.candidates))
    return f"{line}, against {number(start.score)} at the start: {difference}"


def difference_words(difference: Difference | None, *, chosen_from: int = 1) -> str:
    """A difference with its interval, and a note where choosing the best of several favours it.

    >>> difference_words(Difference(0.16, 0.05, 0.27, 64))
    '+0.160 (95% interval 0.050 to 0.270, 64 problems)'
    >>> difference_words(Difference(0.5, None, None, 1), chosen_from=4)
    '+0.500 (one problem, so no interval; the best of 4 by these problems, so favoured)'

    Args:
        chosen_from: How many candidates there were to choose from. The best was chosen by the same problems.
    """
    if difference is None:
        return "not comparable"
    favoured = f"; the best of {chosen_from} by these problems, so favoured" if chosen_from > 1 else ""
    return f"{signed(difference.mean)} ({difference.words}{favoured})"


def validations_table(record: RunRecord) -> TextTable:
    """Every validation, with its difference to the start."""
    rows = [_row(state, record) for state in record.validations]
    title = f"Validations ({INTERVAL}; {CHOSEN})"
    columns = ("state", "weights", "score", "rollouts", "difference to the start", "interval")
    return TextTable(title, columns, rows, words=2)


def _row(state: Validated, record: RunRecord) -> list[str]:
    start = record.start_validated
    difference = None if start is None or state is start else gain(start, state)
    marked = " (returned)" if state is record.returned else ""
    return [
        state.where + marked,
        state.weights,
        number(state.score),
        f"{state.counts.get('rollouts', 0):,}",
        signed(difference.mean) if difference else DASH,
        interval(difference.low, difference.high) if difference else DASH,
    ]


class ValidationFigures(TypedDict):
    """A validation as JSON: what the table shows, and the scores of the candidates."""

    index: int
    when: str
    step: int
    weights: str
    score: float | None
    sampled_tokens: int
    seconds: float
    scores: dict[str, float]
    """Digest -> score."""
    counts: dict[str, int]
    gain: dict[str, float | int | None] | None
    """The fields of `dspy_fst.run.paired.Difference`, against the start."""


def validation_figures(record: RunRecord, state: Validated) -> ValidationFigures:
    start = record.start_validated
    difference = None if start is None or state is start else gain(start, state)
    return {
        "index": state.index,
        "when": state.when,
        "step": state.step,
        "weights": state.weights,
        "score": state.score,
        "sampled_tokens": state.sampled_tokens,
        "seconds": state.seconds,
        "scores": dict(state.scores),
        "counts": dict(state.counts),
        "gain": None if difference is None else asdict(difference),
    }
