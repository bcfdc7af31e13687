"""What stopped a run that was under way, as its last event; a run that was killed has none.

    {"event": "halted", "why": "SIGTERM"}
    {"event": "halted", "why": "MeasurementError: step 3: 20 of 24 rollouts measured nothing ..."}

A run that goes on cuts it with all that stands after its last commit. A run whose alternation is over says why in
another event, see `dspy_fst.run.ending`; that one comes after the validation of the end, so a run that is stopped while
its end is validated is told here.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.ending import ended_of
from dspy_fst.run.interrupts import interruption_named

EVENT = "halted"
LONGEST = 300
"""Characters of an error that are kept: its first sentences say what happened (ours)."""


def tell_halted(run: RunDirectory, error: BaseException) -> None:
    """Write why the run stops here, where it has something to go on from and has not told an end."""
    with suppress(Exception):  # a disk that is full must not hide what the run stopped for
        if run.state and ended_of(run.events()) is None:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            run.emit(EVENT, why=interruption_named(error) or words[:LONGEST])


def halted_of(events: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the run was stopped; None for one that was killed, goes on, or is of an older release."""
    told = [event.get("why") for event in events if event.get("event") == EVENT]
    return str(told[-1]) if told else None
