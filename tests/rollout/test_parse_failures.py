"""Why a reply did not parse: the field, what came and what is allowed, whichever adapter reads it."""

import enum
import json
from typing import Literal

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError

from dspy_fst.rollout.parse_failures import LONGEST, WRONG_VALUE, feedback_on

Mood = enum.Enum("Mood", {"GOOD": "good", "BAD": "bad"})
ALLOWED = "'so-so' came, and it should be 'good' or 'bad'"
VALUES = {
    "literal": (Literal["good", "bad"], "so-so", f"'mood': {ALLOWED}"),
    "optional literal": (Literal["good", "bad"] | None, "so-so", f"'mood': {ALLOWED}"),
    "enum": (Mood, "so-so", f"'mood': {ALLOWED}"),
    "int": (int, "four", "'mood': 'four' came, and it should be a valid integer"),
    "long": (Literal["good"], "x" * 500, f"'mood': '{'x' * (LONGEST - 1)}... came, and it should be 'good'"),
}
REPLIES = {
    "chat": (dspy.ChatAdapter(), lambda value: f"[[ ## why ## ]]\nbecause\n\n[[ ## mood ## ]]\n{value}\n"),
    "json": (dspy.JSONAdapter(), lambda value: json.dumps({"why": "because", "mood": value})),
    "xml": (dspy.XMLAdapter(), lambda value: f"<why>because</why><mood>{value}</mood>"),
}


def feedback(adapter, annotation, reply):
    fields = {"text": (str, dspy.InputField()), "why": (str, dspy.OutputField())}
    signature = dspy.Signature({**fields, "mood": (annotation, dspy.OutputField())})
    with pytest.raises(AdapterParseError) as error:
        adapter.parse(signature, reply)
    return feedback_on(error.value), str(error.value)


@pytest.mark.parametrize("adapter", REPLIES)
@pytest.mark.parametrize("kind", VALUES)
def test_the_field_what_came_and_what_is_allowed_come_first(adapter, kind):
    reads, reply = REPLIES[adapter]
    annotation, value, reason = VALUES[kind]
    told, whole = feedback(reads, annotation, reply(value))
    first, rest = told.split("\n", 1)
    assert first.startswith(WRONG_VALUE + reason)
    assert rest == whole, "what DSPy says stays"


def test_a_part_of_a_list_is_named_by_its_place():
    told, _ = feedback(dspy.JSONAdapter(), list[Literal["a", "b"]], '{"why": "x", "mood": ["a", "c"]}')
    assert told.startswith(f"{WRONG_VALUE}'mood'[1]: 'c' came, and it should be 'a' or 'b'\n")


def test_fields_that_are_missing_are_told_as_dspy_does():
    told, whole = feedback(dspy.ChatAdapter(), str, "Failed to parse field mood, I think")
    assert told == f"The reply could not be parsed: {whole}"
