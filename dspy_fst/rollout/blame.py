"""Whose fault is it that a metric gave no score: the metric's, or that of what the policy wrote?

A metric that reads ``float(pred.price)`` or ``pred.plan["steps"]`` is right, and still raises when the policy writes
"soon", None or a dict without that key. Two findings put it on the policy's account:

- The prediction holds a number that is not finite (a float field that says "nan", "inf" or "1e400", or a text that
  ``float()`` reads as one), and the score is not finite either, or the metric could not calculate with it.
- The metric measures the same prediction once the labels stand in it: the example's own, and those of other examples,
  which are wrong answers of the right form. Then nothing but the values that the policy wrote keeps it from measuring.

Everything else stays the metric's fault, and measures nothing: no label in the prediction, a label of another type than
what the program gives, an outage of a judge, a bug that a wrong answer of the right form meets as well. So does
whatever a metric that asked an LM could not read: it may be the judge's words, which depend on the answer too.
"""

import dataclasses
import math
import threading
from collections.abc import Iterator, Mapping
from numbers import Complex, Real
from typing import Any

import dspy
from pydantic import BaseModel

from dspy_fst.rollout.reward import NotFiniteScoreError, Reward, UnmeasuredError

NOT_FINITE = "not finite"
"""A failure's reason: the policy wrote a number that is nan or infinite."""
OF_VALUES = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
"""What reading or calculating with a bad value raises. Other exceptions say nothing of a value."""
DEEPEST = 8
"""Levels of nested values that are looked into (ours)."""
PEERS = 2
"""Other examples whose labels are tried (ours): one wrong answer may be right by chance, as in a yes or no."""


class Blame:
    """Decides for one metric. Each example and place of the metric is tried once. Thread-safe."""

    def __init__(self, reward: Reward):
        self._reward = reward
        self._known: dict[tuple[int, str], tuple[dspy.Example, bool]] = {}
        self._lock = threading.Lock()

    def of_policy(self, gold: dspy.Example, pred: Any, trace: Any, error: UnmeasuredError) -> tuple[str, str] | None:
        """(reason, feedback) of the policy's failure; None when the metric is to blame, or nobody can tell."""
        if not isinstance(pred, dspy.Prediction):
            return None
        cause = error.__cause__
        calculated = isinstance(error, NotFiniteScoreError) or isinstance(cause, ValueError | ArithmeticError)
        labels = dict(gold.labels().items())
        if calculated and (bad := next(_not_finite(dict(pred.items())), None)) and not any(_not_finite(labels)):
            return NOT_FINITE, f"The prediction holds a number that is not finite: {bad}."
        if error.asked_an_lm or not (isinstance(error, NotFiniteScoreError) or isinstance(cause, OF_VALUES)):
            return None
        if not self._measures_labels(gold, pred, trace, _place(error)):
            return None
        said = f"{type(cause).__name__}: {cause}" if cause else str(error)
        reason = "metric could not read what the policy wrote"
        return f"{reason} ({type(cause).__name__ if cause else 'nan'})", f"The answer could not be read: {said}"

    def _measures_labels(self, gold: dspy.Example, pred: dspy.Prediction, trace: Any, place: str) -> bool:
        key = (id(gold), place)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            known = (gold, self._try_labels(gold, pred, trace))  # the example is kept, or its id would be another's
            with self._lock:
                self._known[key] = known
        return known[1]

    def _try_labels(self, gold: dspy.Example, pred: dspy.Prediction, trace: Any) -> bool:
        own = _labels_in(gold, pred)
        others = [labels for peer in self._reward.peers if (labels := _labels_in(peer, pred)) and labels != own]
        if not own or not others:
            return False
        if any(not _same_form(pred[name], label) for name, label in own.items()):
            return False  # the program gives another kind of thing than the metric is made for
        return all(self._measures(gold, _with(pred, labels), trace) for labels in (own, *others[:PEERS]))

    def _measures(self, gold: dspy.Example, pred: dspy.Prediction, trace: Any) -> bool:
        try:
            self._reward(gold, pred, trace)
        except UnmeasuredError:
            return False
        return True


def _labels_in(example: dspy.Example, pred: dspy.Prediction) -> dict[str, Any]:
    """The example's labels that the prediction has as well."""
    return {name: label for name, label in example.labels().items() if name in pred and label is not None}


def _with(pred: dspy.Prediction, labels: Mapping[str, Any]) -> dspy.Prediction:
    return dspy.Prediction(**{**dict(pred.items()), **labels})


def _same_form(written: Any, label: Any) -> bool:
    """Whether a value may stand where the label does: the same type, any number for a number, or nothing at all."""
    both_numbers = isinstance(written, Real) and isinstance(label, Real)
    return written is None or both_numbers or isinstance(written, type(label)) or isinstance(label, type(written))


def _place(error: UnmeasuredError) -> str:
    """Where in the metric it was raised: file and line of the innermost frame."""
    trace = (error.__cause__ or error).__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{error}" if trace is None else f"{error} {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _not_finite(value: Any, at: str = "", depth: int = 0) -> Iterator[str]:
    """Places of numbers that are not finite, as ``field.part = nan``."""
    if isinstance(value, bool | bytes) or depth > DEEPEST:
        return
    if isinstance(value, str):
        if _reads_odd(value):
            yield f"{at} = {value}"
        return
    if isinstance(value, Complex):  # int and float, numpy's scalars, Fraction
        if _is_odd(value):
            yield f"{at} = {value}"
        return
    if type(value).__name__ == "Decimal":
        if not value.is_finite():
            yield f"{at} = {value}"
        return
    for name, part in _parts(value):
        yield from _not_finite(part, f"{at}.{name}" if at else str(name), depth + 1)


def _is_odd(value: Any) -> bool:
    try:
        number = complex(value)
    except OverflowError:  # an int beyond any float is finite
        return False
    return not (math.isfinite(number.real) and math.isfinite(number.imag))


def _reads_odd(text: str) -> bool:
    """Whether ``float()``, with which a metric reads a text, gives nan or an infinity."""
    try:
        return not math.isfinite(float(text))
    except ValueError:
        return False


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping | dspy.Example):  # a dspy.Prediction is an Example, and no Mapping
        yield from value.items()
    elif isinstance(value, BaseModel):
        yield from ((name, getattr(value, name)) for name in type(value).model_fields)
        yield from (value.model_extra or {}).items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    elif hasattr(value, "tolist") and hasattr(value, "dtype"):  # an array
        yield from enumerate(value.tolist() if isinstance(value.tolist(), list) else [value.tolist()])
