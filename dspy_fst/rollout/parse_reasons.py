"""Why a reply did not parse, in a sentence: which field had a value that its type does not allow, and what is allowed.

DSPy's adapters raise one error for all of it. What pydantic or DSPy said of the value hangs on that error: as its
cause, or as its context where the adapter names none (ChatAdapter of DSPy 3.4).
"""

import enum
import re
from typing import Any

import pydantic
from dspy.utils.exceptions import AdapterParseError

WRONG_VALUE = "The reply could not be parsed: field "
"""How the feedback on such a reply begins; a warning shows the line."""
LONGEST = 100
"""Characters of a value that are shown (ours)."""


def feedback_on(error: AdapterParseError) -> str:
    """What the rollout is told of a reply that did not parse: the reason where a value was wrong, then DSPy's words."""
    reason = _reason(error)
    return f"{WRONG_VALUE}{reason}\n{error}" if reason else f"The reply could not be parsed: {error}"


def _reason(error: AdapterParseError) -> str:
    """E.g. ``"'mood': 'so-so' came, and it should be 'good' or 'bad'"``; empty where no value was wrong."""
    cause, field = error.__cause__ or error.__context__, _field(error)
    if field is None:
        return ""
    if isinstance(cause, pydantic.ValidationError):
        first = cause.errors(include_url=False, include_context=False)[0]
        within = "".join(f"[{part!r}]" for part in first["loc"])
        wanted = first["msg"].replace("Input should be", "it should be", 1)
        return f"{field!r}{within}: {_came(first['input'])} came, and {wanted}"
    annotation = error.signature.output_fields[field].annotation
    if isinstance(cause, ValueError) and isinstance(annotation, enum.EnumMeta):
        members = " or ".join(repr(getattr(annotation, name).value) for name in annotation.__members__)
        return f"{field!r}: {str(cause).partition(' is not')[0]!r} came, and it should be {members}"
    return ""


def _field(error: AdapterParseError) -> str | None:
    """The output field whose value DSPy could not take; XMLAdapter says its definition instead of its name."""
    said = str(error)
    for name, field in error.signature.output_fields.items():
        if re.match(rf"Failed to parse field {re.escape(name)}\b", said) or said.startswith(
            f"Failed to parse field {field} with value"
        ):
            return str(name)
    return None


def _came(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
