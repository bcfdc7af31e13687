"""What stopped a running run, as its last event. A killed run has none.

    {"event": "halted", "why": "SIGTERM"}
    {"event": "halted", "why": "MeasurementError: step 3: 20 of 24 rollouts measured nothing ..."}

A run that continues cuts this event with all others after its last commit. A run whose alternation is over has another
event, see `dspy_fst.run.ending`. That one comes after the validation of the end, so a run that is stopped during this
validation has a ``halted`` event.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.ending import stop_reason_in
from dspy_fst.run.interrupts import interruption_named

EVENT = "halted"
LONGEST = 300
"""Characters of an error that are kept (ours): its first sentences say what happened."""


def emit_halted(run: RunDirectory, error: BaseException) -> None:
    """Write why the run stops, if it can be continued and has no stop reason yet."""
    with suppress(Exception):  # a full disk must not hide the error that stopped the run
        if run.state and stop_reason_in(run.events()) is None:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            run.emit(EVENT, why=interruption_named(error) or words[:LONGEST])


def halt_reason_in(events: Sequence[Mapping[str, object]]) -> str | None:
    """Why the run was stopped; None for a run that was killed, goes on, or is of an older release."""
    reasons = [event.get("why") for event in events if event.get("event") == EVENT]
    return str(reasons[-1]) if reasons else None
