"""Why the alternation of a run ended: one form for the events, the records, the command line and Python.

Every run that ends by itself writes one event, after its last commit and the end's validation:

    {"event": "ended", "reason": {"kind": "complete", "step": 12, "text": "all 12 updates of the plan are done"}}

A run that goes on cuts what stands after its last commit, this event among it. So the events of a run hold a reason
exactly when nothing more will happen in it unless somebody continues it; a run that was killed or that failed has none,
also when that happened while its end was validated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["complete", "early_stopping", "nothing_learned"]
EVENT = "ended"
SETTINGS: Mapping[Kind, str] = {"early_stopping": "patience", "nothing_learned": "max_unmoved_steps"}
"""Kind -> the setting that ended the run before its plan was done."""


@dataclass(frozen=True)
class StopReason:
    """Why no further step is made.

    >>> StopReason("early_stopping", 6, "3 validations in a row brought no new best (patience=3)").kind
    'early_stopping'
    """

    kind: Kind
    """``"complete"``: the plan is done. The others ended the run before that; it can be continued."""
    step: int
    """Steps that were done."""
    text: str
    """What was seen, in a few words on one line. No full stop at its end."""
    advice: str | None = None
    """What to do, where something can be done; it may have several lines and hold Python. No full stop at its end."""

    @property
    def early(self) -> bool:
        """Whether steps of the plan are left."""
        return self.kind != "complete"

    @property
    def setting(self) -> str | None:
        """The setting that a run goes on with when it is raised.

        >>> StopReason("early_stopping", 6, "3 validations in a row brought no new best").setting
        'patience'
        """
        return SETTINGS.get(self.kind)

    @property
    def told(self) -> dict[str, Any]:
        """What the event holds; without an advice where there is none."""
        return {name: value for name, value in vars(self).items() if value is not None}


def complete(steps: int) -> StopReason:
    """The reason of a run that did all of its plan.

    >>> complete(1).text
    'all of the plan is done: 1 step'
    """
    return StopReason("complete", steps, f"all of the plan is done: {steps} step{'' if steps == 1 else 's'}")


def ended_of(events: Sequence[Mapping[str, Any]]) -> StopReason | None:
    """The reason that a run's events tell; None for one that goes on, was killed, failed, or is of an older release."""
    reasons = [event["reason"] for event in events if event.get("event") == EVENT]
    if not reasons:
        return None
    kind, step, text, advice = (reasons[-1].get(name) for name in ("kind", "step", "text", "advice"))
    if advice is None and "\n" in str(text):  # an older release wrote one below the other
        text, _, advice = str(text).partition("\n")
        text = text.removesuffix(".")
    return StopReason(kind, step, text, advice)
