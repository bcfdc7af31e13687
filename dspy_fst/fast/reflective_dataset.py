"""What a reflection is shown of one run, within a budget of tokens: a call, the metric's feedback, the other calls."""

from collections.abc import Mapping, Sequence
from typing import cast

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction
from dspy.teleprompt.gepa.instruction_proposal import ReflectiveExample as Record

from dspy_fst.rollout.parse_failures import Entry, form_asked_for, form_of
from dspy_fst.types import PREDICTOR_TAG

CHARACTERS = 4
"""Estimated characters of a token: the reflection LM's tokenizer is not known here (ours)."""
FLOOR = 4
"""Each of a record's three parts is granted 1/FLOOR of the budget before another part may use it (ours)."""
SHORTEST = 200
"""Characters that a field of another call keeps at least, before whole calls are left out (ours)."""
REST = "Rest of the Run"

FOLLOW = "Your output failed to parse. Follow this structure:\n"
"""DSPy's words, before what a ChatAdapter of its own would have asked for."""


def asked_for(record: Record, failed: FailedPrediction, predictor: dspy.Predict | None) -> Record:
    """The record of a reply that did not parse, with the form that the adapter in force asks for.

    Args:
        predictor: Under the candidate; asked where the reply does not say in what form it was wanted.
    """
    form = form_of(failed) or (form_asked_for(predictor) if predictor is not None else "")
    return {**record, "Feedback": FOLLOW + form} if form else record


def bounded(record: Record, others: Sequence[Entry], tokens: int) -> Record:
    """The record with the run's other calls, all of it within the budget.

    Feedback is cut last, then the call's own fields, then the other calls; within each part the longest fields are
    cut first, in their middle. Images and other dspy.Type values are kept whole and not counted.

    Args:
        others: DSPy's trace entries of the run's other calls, in order.
        tokens: Of CHARACTERS characters each.
    """
    budget = tokens * CHARACTERS
    feedback, rest = str(record["Feedback"]), _told(others, budget)
    own = _fields(record)
    lengths = [len(str(value)) for value in own.values() if not isinstance(value, dspy.Type)]
    own_floor, rest_floor = min(sum(lengths), budget // FLOOR), min(len(rest), budget // FLOOR)
    feedback = cut(feedback, budget - own_floor - rest_floor)
    room = min(sum(lengths), budget - len(feedback) - rest_floor)
    limit = fair_share(lengths, room)
    shown = {place: _within(value, limit) for place, value in own.items()}
    rest = cut(rest, budget - len(feedback) - room)
    cut_down: Record = {**_with_fields(record, shown), "Feedback": feedback}
    return cast(Record, {**cut_down, REST: rest}) if rest else cut_down


def fair_share(lengths: Sequence[int], room: int) -> int:
    """The largest limit with which all of the texts, each cut to it, have room.

    >>> fair_share([10, 100, 300], 210)
    100
    >>> fair_share([10, 300, 300], 210)
    100
    """
    left = room
    for shorter, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - shorter)
        if length > share:
            return share
        left -= length
    return max(lengths, default=0)


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and end with a mark that says how much is left out between them.

    >>> cut("a" * 50 + "b" * 50, 60)
    'aaaaaaaaaaaaa [... 75 characters left out ...] bbbbbbbbbbbb'
    """
    if len(text) <= limit:
        return text
    kept = max(0, limit - len(_mark(len(text))))
    mark, head = _mark(len(text) - kept), (kept + 1) // 2
    return (text[:head] + mark + text[len(text) - kept // 2 :])[: max(0, limit)]


def _mark(left_out: int) -> str:
    return f" [... {left_out} characters left out ...] "


def _within(value: object, limit: int) -> object:
    """A value that fits as it is, else its text cut."""
    fits = isinstance(value, dspy.Type) or len(str(value)) <= limit
    return value if fits else cut(str(value), limit)


def _fields(record: Record) -> dict[tuple[str, str], object]:
    """(part, field) -> value; a reply that did not parse is one field."""
    said = record["Generated Outputs"]
    parts = {"Inputs": record["Inputs"], "Generated Outputs": said if isinstance(said, dict) else {"": said}}
    return {(part, name): value for part, fields in parts.items() for name, value in fields.items()}


def _with_fields(record: Record, values: Mapping[tuple[str, str], object]) -> Record:
    inputs, said = (
        {name: value for (where, name), value in values.items() if where == part}
        for part in ("Inputs", "Generated Outputs")
    )
    parsed = isinstance(record["Generated Outputs"], dict)
    return {**record, "Inputs": inputs, "Generated Outputs": said if parsed else str(said[""])}


def _told(entries: Sequence[Entry], budget: int) -> str:
    """Calls, one a paragraph; no field takes more than its share of the budget."""
    calls = [(getattr(predictor, PREDICTOR_TAG, "?"), inputs, _outputs(said)) for predictor, inputs, said in entries]
    lengths = [len(str(value)) for _, *sides in calls for side in sides for value in side.values()]
    limit = max(SHORTEST, fair_share(lengths, budget))
    return "\n\n".join(
        f"{name}: {_listed(inputs, limit)} -> {_listed(outputs, limit)}" for name, inputs, outputs in calls
    )


def _outputs(said: dspy.Prediction | FailedPrediction) -> dict[str, object]:
    if isinstance(said, FailedPrediction):
        return {"a reply that did not parse": said.completion_text}
    return dict(said.items())


def _listed(fields: Mapping[str, object], limit: int) -> str:
    return ", ".join(f"{name}={cut(repr(value), limit)}" for name, value in fields.items())
