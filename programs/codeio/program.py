"""The program, one predictor that reasons, and the metric that compares values."""

import ast
import json
import math
from collections.abc import Iterable
from typing import Any

import dspy

from programs.common import judged, said

LONGEST = 10_000
"""Characters of an answer that are parsed: deep nesting costs the parser its stack."""


class Output(dspy.Signature):
    """Predict what the program returns for the input."""

    code: str = dspy.InputField()
    input: str = dspy.InputField()
    output: str = dspy.OutputField(desc="the returned value as a Python literal, and nothing else")


class PredictOutput(dspy.Module):
    """One predictor: code, input -> output."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.ChainOfThought(Output)

    def forward(self, code: str, input: str) -> dspy.Prediction:
        return self.predict(code=code, input=input)


def metric(
    gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    """1 for the same value, however it is written, else 0 and the first difference."""
    want, got = gold.output, said(pred, "output")
    try:
        expected = parsed(want)
    except ValueError:
        return judged(None if got == want else f"Expected {want}, got {got[:200]}.")
    try:
        return judged(difference(expected, parsed(got)))
    except ValueError:
        return judged(f"The output is not a Python value: {got[:200]!r}. Expected {want}.")


def parsed(text: str) -> Any:
    """The value of a Python or JSON literal, in a code fence or not.

    Raises:
        ValueError: it is neither.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters are too many")
    text = text.strip().removeprefix("```python").removeprefix("```json").strip("`").strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        try:
            return json.loads(text)  # the public outputs are JSON, and a reply may say true for True
        except (ValueError, RecursionError) as error:
            raise ValueError("no literal") from error


def difference(want: Any, got: Any, place: str = "") -> str | None:
    """The first difference of two values, as a sentence; None when they are equal.

    1 and 1.0 are the same number; True is none, and a tuple is no list.

    Args:
        place: Where in the output they stand, such as "[2]['a']".
    """
    where = f"The output at {place}" if place else "The output"
    if _is_number(want) and _is_number(got):
        return None if math.isclose(want, got, rel_tol=1e-9) else f"{where} is {got!r}; expected {want!r}."
    if type(want) is not type(got):
        return f"{where} is {got!r}, of type {type(got).__name__}; expected {want!r}, of type {type(want).__name__}."
    if isinstance(want, dict):
        return _of_keys(want, got, where) or _of_parts(want, got, want, place)
    if isinstance(want, list | tuple):
        shared = range(min(len(want), len(got)))
        return _of_parts(want, got, shared, place) or _of_length(want, got, where)
    return None if want == got else f"{where} is {got!r}; expected {want!r}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of_parts(want: Any, got: Any, keys: Iterable[Any], place: str) -> str | None:
    faults = (difference(want[key], got[key], f"{place}[{key!r}]") for key in keys)
    return next((fault for fault in faults if fault), None)


def _of_length(want: Any, got: Any, where: str) -> str | None:
    if len(want) == len(got):
        return None
    return f"{where} has {len(got)} elements; expected {len(want)}: {want!r}."


def _of_keys(want: dict[Any, Any], got: dict[Any, Any], where: str) -> str | None:
    if missing := [key for key in want if key not in got]:
        return f"{where} lacks the key {missing[0]!r}; expected {want!r}."
    if extra := [key for key in got if key not in want]:
        return f"{where} has the key {extra[0]!r}, which does not belong there; expected {want!r}."
    return None
