"""Why a run ended or was stopped, in one form for events, reports, the command line and Python, and how to go on.

A run that ends by itself writes one event, after its last commit and the validation of its end:

    {"event": "ended", "reason": {"kind": "complete", "step": 12, "text": "all 12 updates of the plan are done"}}

A run that is stopped, by an error or a signal, writes another. So does a run that is stopped during the validation of
its end. A killed run has none.

    {"event": "halted", "why": "SIGTERM"}
    {"event": "halted", "why": "MeasurementError: step 3: 20 of 24 rollouts measured nothing ..."}

A run that continues cuts the events after its last commit, these included. So the events hold a stop reason exactly
when the run is over until somebody continues it.
"""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dspy_fst.run.interrupts import interruption_named

if TYPE_CHECKING:
    from dspy_fst.run.directory import Event, RunDirectory

# ---- ended ---------------------------------------------------------------------------------------


Kind = Literal["complete", "early_stopping", "nothing_learned"]
EVENT = "ended"
SETTINGS: Mapping[Kind, str] = {"early_stopping": "patience", "nothing_learned": "max_unmoved_steps"}
"""Kind -> the setting that ended the run before its plan was complete."""


@dataclass(frozen=True)
class StopReason:
    """Why no further step is made.

    >>> StopReason("early_stopping", 6, "3 validations in a row brought no new best (patience=3)").kind
    'early_stopping'
    """

    kind: Kind
    """``"complete"``: the plan is done. The others ended the run earlier, and it can be continued."""
    step: int
    """How many steps were done."""
    text: str
    """The cause in a few words on one line, without a full stop."""
    advice: str | None = None
    """What the user can do, if anything; possibly several lines with Python, without a full stop."""

    @property
    def early(self) -> bool:
        """Whether steps of the plan are left."""
        return self.kind != "complete"

    @property
    def setting(self) -> str | None:
        """The setting to raise so that the run continues.

        >>> StopReason("early_stopping", 6, "3 validations in a row brought no new best").setting
        'patience'
        """
        return SETTINGS.get(self.kind)

    @property
    def as_event(self) -> dict[str, object]:
        """The event's fields; no advice where there is none."""
        return {name: value for name, value in vars(self).items() if value is not None}


def complete(steps: int) -> StopReason:
    """The reason of a run that completed its plan.

    >>> complete(1).text
    'all of the plan is done: 1 step'
    """
    return StopReason("complete", steps, f"all of the plan is done: {steps} step{'' if steps == 1 else 's'}")


def stop_reason_in(events: "Sequence[Event]") -> StopReason | None:
    """The reason in a run's events; None for a run that goes on, was killed, failed, or is of an older release."""
    reasons = [event["reason"] for event in events if event.get("event") == EVENT]
    if not reasons:
        return None
    kind, step, text, advice = (reasons[-1].get(name) for name in ("kind", "step", "text", "advice"))
    if advice is None and "\n" in str(text):  # an older release wrote one below the other
        text, _, advice = str(text).partition("\n")
        text = text.removesuffix(".")
    return StopReason(kind, step, text, advice)


# ---- halted --------------------------------------------------------------------------------------


HALTED = "halted"
LONGEST = 300
"""Characters of an error that are kept (ours): its first sentences say what happened."""


def emit_halted(run: "RunDirectory", error: BaseException) -> None:
    """Write why the run stops, if it can be continued and has no stop reason yet."""
    with suppress(Exception):  # a full disk must not hide the error that stopped the run
        if run.state and stop_reason_in(run.events()) is None:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            run.emit(HALTED, why=interruption_named(error) or words[:LONGEST])


def halt_reason_in(events: "Sequence[Event]") -> str | None:
    """Why the run was stopped; None for a run that was killed, goes on, or is of an older release."""
    reasons = [event.get("why") for event in events if event.get("event") == HALTED]
    return str(reasons[-1]) if reasons else None


# ---- going on ------------------------------------------------------------------------------------


def by_command_line(setting: str, run_dir: Path) -> str:
    """How to continue a run that a setting ended, on the command line; also for a run that Python made."""
    return (
        f"On the command line: raise {setting} in the recipe of the project file, or set it to null, then "
        f"dspy-fst run FILE, or dspy-fst resume {shlex.quote(str(run_dir))} --project FILE"
    )


def why_no_program(run_dir: Path) -> str:
    """Why a run's directory holds no compiled program, and what to do. No full stop at the end."""
    from dspy_fst.run.directory import COMPILED, read_events  # imported here: the command line's help needs no DSPy

    events = read_events(run_dir)
    ended = stop_reason_in(events)
    if ended is not None and ended.setting and not any(event.get("event") == "done" for event in events):
        return f"{run_dir} holds no {COMPILED}/: {_stopped(ended, run_dir)}"
    return (
        f"{run_dir} holds no {COMPILED}/: the run has not ended, or an earlier release made it. Going on, "
        f"with dspy-fst resume {shlex.quote(str(run_dir))} or by the same compile() in Python, ends it and saves the "
        "program there"
    )


def _stopped(ended: StopReason, run_dir: Path) -> str:
    return (
        f"{ended.setting} stopped the run after {ended.step} steps, and it returned no program. {ended.text}. To go on "
        f"in Python: the same compile() with {ended.setting} raised, or None. "
        f"{by_command_line(str(ended.setting), run_dir)}"
    )
