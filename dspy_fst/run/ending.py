"""`StopReason`: why the alternation of a run ended, in one form for events, reports, the command line and Python.

Every run that ends by itself writes one event, after its last commit and the validation of its end:

    {"event": "ended", "reason": {"kind": "complete", "step": 12, "text": "all 12 updates of the plan are done"}}

A run that continues cuts the events after its last commit, this one included. So the events hold a reason exactly when
the run is over until somebody continues it. A run that was killed or that failed has none, even when that happened
during the validation of its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    def as_event(self) -> dict[str, Any]:
        """The event's fields; no advice where there is none."""
        return {name: value for name, value in vars(self).items() if value is not None}


def complete(steps: int) -> StopReason:
    """The reason of a run that completed its plan.

    >>> complete(1).text
    'all of the plan is done: 1 step'
    """
    return StopReason("complete", steps, f"all of the plan is done: {steps} step{'' if steps == 1 else 's'}")


def stop_reason_in(events: Sequence[Mapping[str, Any]]) -> StopReason | None:
    """The reason in a run's events; None for a run that goes on, was killed, failed, or is of an older release."""
    reasons = [event["reason"] for event in events if event.get("event") == EVENT]
    if not reasons:
        return None
    kind, step, text, advice = (reasons[-1].get(name) for name in ("kind", "step", "text", "advice"))
    if advice is None and "\n" in str(text):  # an older release wrote one below the other
        text, _, advice = str(text).partition("\n")
        text = text.removesuffix(".")
    return StopReason(kind, step, text, advice)
