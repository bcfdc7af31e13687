"""Decides how a rollout ended: scored, failed because of the policy, or masked. No other module decides it.

Failures of the policy get a failure score: a reply that does not parse, a context that overflows, a program that cannot
go on with what the policy wrote, a metric that cannot read it. A rollout that did not measure the policy is masked: an
outage, a failure of a frozen LM, a program that fails before it called the policy, a metric that fails by itself.

A metric that reads ``float(pred.price)`` or ``pred.plan["steps"]`` is right, and still raises when the policy writes
"soon", None or a dict without that key. The policy is at fault in two cases:

- The prediction holds a number that is not finite: a float field with "nan", "inf" or "1e400", or a text that
  ``float()`` reads as one. And the score is not finite either, or the metric could not calculate with the number.
- The metric can measure the prediction after labels are put into it: the example's own, then those of other examples,
  which are wrong answers of the right form. Then only the values that the policy wrote kept it from measuring.

In all other cases the metric is at fault, and nothing is measured: there is no label in the prediction, a label has
another type than the program's output, a judge has an outage, or the metric has a bug that a wrong answer of the right
form meets as well. The second case never holds for a metric that called an LM: it may have failed on the judge's words.
"""

import asyncio
import math
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from decimal import Decimal
from numbers import Complex, Real

import dspy
from dspy.predict.flex.bridge import BridgeRuntime
from dspy.primitives.code_interpreter import CodeExecutionError, CodeInterpreterError
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError
from pydantic import BaseModel

from dspy_fst.outcomes.outcome import CONTEXT, PARSE, Outcome
from dspy_fst.rollout.call_recorder import OUTSIDE, Recording, is_recorded
from dspy_fst.rollout.outages import Outages
from dspy_fst.rollout.parse_failures import Entry, ParseFailures, feedback_on
from dspy_fst.rollout.rendering import RecordedCall
from dspy_fst.rollout.reward import NotFiniteScoreError, Reward, UnmeasuredError
from dspy_fst.types import PREDICTOR_TAG, Call, Candidate, Problem, Rollout

STARTS = ("_create_interpreter", "install")
"""Functions that dspy.Flex 3.4 calls before it passes its source to the interpreter."""
NOT_FINITE = "not finite"
"""Reason of a failure: the policy wrote a number that is nan or infinite."""
OF_VALUES = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
"""Exceptions of code that reads a bad value or calculates with it. Other exceptions say nothing about a value."""
DEEPEST = 8
"""Levels of nested values that are searched for numbers (ours)."""
PEERS = 2
"""Other examples whose labels are tried (ours). One wrong answer may be right by chance, e.g. a yes or no."""


@dataclass(frozen=True)
class Judgement:
    """A rollout's reward, and what is known about how it ended."""

    reward: float | None
    outcome: Outcome
    failed_in: str | None = None
    prediction: object = None
    predictor_scores: Mapping[str, float] = field(default_factory=dict)

    def rollout(
        self,
        problem: Problem,
        candidate: Candidate,
        calls: tuple[Call, ...],
        trace: tuple[Entry, ...],
        asked: tuple[RecordedCall, ...],
    ) -> Rollout:
        """The rollout that was judged."""
        return Rollout(
            problem.index,
            candidate,
            calls,
            self.reward,
            self.outcome,
            failed_in=self.failed_in,
            predictor_scores=self.predictor_scores,
            prediction=self.prediction,
            trace=trace,
            asked=asked,
        )


@dataclass(frozen=True)
class Judge:
    """Decides the outcome of one rollout from what was noted during it."""

    recording: Recording
    parse_failures: ParseFailures
    outages: Outages
    failure_score: float
    format_failure_score: float

    def raised(self, error: BaseException) -> Judgement:
        """The outcome of a program that raised."""
        name = type(error).__name__
        failed_in, frozen = failing_predictor(error)
        if isinstance(error, AdapterParseError) and not frozen:
            return self._unparsed(error, failed_in)
        if isinstance(error, ContextWindowExceededError) and not frozen:
            return self._failed(CONTEXT, str(error), failed_in)
        if isinstance(error, AdapterParseError | LMError):
            who = "frozen lm" if frozen else "lm"
            cause = error.__cause__ or error
            return _masked(f"{who}: {type(cause).__name__}", str(cause))
        if isinstance(error, OSError | asyncio.CancelledError):  # such as TimeoutError: a tool's outage
            return _masked(f"outage: {name}")
        if _is_the_source_s(error):
            return self._failed("source", f"{name}: {error}")
        if isinstance(error, CodeInterpreterError):
            return _masked(f"interpreter: {name}", str(error))
        if outage := self.outages.behind(error):
            return _masked(outage, repr(error))
        if self.recording.last_predictor in (None, OUTSIDE):  # it failed before the policy replied
            return _masked(f"program: {name}", repr(error))
        if lost := self.parse_failures.behind():
            return self._unparsed(lost[1], lost[0])
        return self._failed(name, f"The program failed: {error}")

    def returned(
        self, example: dspy.Example, prediction: object, trace: Sequence[Entry], reward: Reward, blame: "Blame"
    ) -> Judgement:
        """The outcome of a program that returned.

        Args:
            example: The problem's example.
            prediction: What the program returned.
            trace: The trace of the finished run.
            reward: Scores the prediction.
            blame: Decides who is at fault if the metric gives no score.
        """
        if prediction is None:  # of BestOfN or Refine, if no try gave one
            return self._nothing()
        try:
            score = reward(example, prediction, trace, apart=self.recording.apart())
        except UnmeasuredError as error:
            return self._unmeasured(example, prediction, trace, error, blame)
        outcome = Outcome("scored", detail=score.feedback)
        return Judgement(score.value, outcome, prediction=prediction, predictor_scores=score.predictor_scores)

    def forget(self) -> None:
        """Drop the exceptions, whose tracebacks hold the rollout's copy of the program."""
        self.parse_failures.forget()
        self.outages.forget()

    def _nothing(self) -> Judgement:
        if outage := self.outages.behind():
            return _masked(outage, "The program gave no prediction.")
        if lost := self.parse_failures.behind():
            return self._unparsed(lost[1], lost[0])
        return self._failed("no prediction", "The program gave no prediction.")

    def _failed(self, reason: str, detail: str, failed_in: str | None = None) -> Judgement:
        return Judgement(self.failure_score, Outcome("failed", reason, detail), failed_in)

    def _unparsed(self, error: AdapterParseError, predictor: str | None) -> Judgement:
        return Judgement(self.format_failure_score, Outcome("failed", PARSE, feedback_on(error)), predictor)

    def _unmeasured(
        self, example: dspy.Example, prediction: object, trace: Sequence[Entry], error: UnmeasuredError, blame: "Blame"
    ) -> Judgement:
        if outage := self.outages.behind():  # it left a hole in the prediction, on which the metric failed
            return _masked(outage, str(error))
        if at_fault := blame.of_policy(example, prediction, trace, error):
            return self._failed(*at_fault)
        detail = repr(error.__cause__) if error.__cause__ else ""
        return replace(_masked(str(error), detail), prediction=prediction)


def _masked(reason: str, detail: str = "") -> Judgement:
    return Judgement(None, Outcome("masked", reason, detail))


def _is_the_source_s(error: BaseException) -> bool:
    """Whether the source of a dspy.Flex is at fault: it raised, returned something refused, or ended its interpreter.

    It is not at fault if the interpreter could not be started, because then it was never run.
    """
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if BridgeRuntime.forward.__code__ not in codes:
        return isinstance(error, CodeExecutionError)
    inside = codes[codes.index(BridgeRuntime.forward.__code__) + 1 :]
    return not inside or inside[0].co_name not in STARTS


def failing_predictor(error: BaseException) -> tuple[str | None, bool]:
    """The innermost tagged predictor in an exception's traceback, and whether its LM is a frozen one.

    The name is None if there is no such predictor.
    """
    name, frozen = None, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        predictor = frame.f_locals.get("self")
        if isinstance(predictor, dspy.Predict) and hasattr(predictor, PREDICTOR_TAG):
            name, frozen = getattr(predictor, PREDICTOR_TAG), not is_recorded(predictor.lm or dspy.settings.lm)
    return name, frozen


# ---- the metric's fault, or the policy's ---------------------------------------------------------


class Blame:
    """Decides who is at fault when one metric gives no score. Thread-safe.

    Labels are tried once for each example and each line of the metric.
    """

    def __init__(self, reward: Reward):
        self._reward = reward
        self._known: dict[tuple[int, str], tuple[dspy.Example, bool]] = {}
        self._lock = threading.Lock()

    def of_policy(
        self, gold: dspy.Example, pred: object, trace: Sequence[Entry], error: UnmeasuredError
    ) -> tuple[str, str] | None:
        """(reason, feedback) of the policy's failure; None if the metric is at fault, or nobody can tell."""
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
        message = f"{type(cause).__name__}: {cause}" if cause else str(error)
        reason = "metric could not read what the policy wrote"
        return f"{reason} ({type(cause).__name__ if cause else 'nan'})", f"The answer could not be read: {message}"

    def _measures_labels(self, gold: dspy.Example, pred: dspy.Prediction, trace: Sequence[Entry], place: str) -> bool:
        key = (id(gold), place)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            known = (gold, self._try_labels(gold, pred, trace))  # without the example its id could be another's
            with self._lock:
                self._known[key] = known
        return known[1]

    def _try_labels(self, gold: dspy.Example, pred: dspy.Prediction, trace: Sequence[Entry]) -> bool:
        right = _labels_in(gold, pred)
        wrong = [labels for peer in self._reward.peers if (labels := _labels_in(peer, pred)) and labels != right]
        if not right or not wrong:
            return False
        if any(not _same_form(pred[name], label) for name, label in right.items()):
            return False  # the program's output is of another kind than the metric is made for
        return all(self._measures(gold, _with(pred, labels), trace) for labels in (right, *wrong[:PEERS]))

    def _measures(self, gold: dspy.Example, pred: dspy.Prediction, trace: Sequence[Entry]) -> bool:
        try:
            self._reward(gold, pred, trace)
        except UnmeasuredError:
            return False
        return True


def _labels_in(example: dspy.Example, pred: dspy.Prediction) -> dict[str, object]:
    """The example's labels whose fields the prediction has, too."""
    return {name: label for name, label in example.labels().items() if name in pred and label is not None}


def _with(pred: dspy.Prediction, labels: Mapping[str, object]) -> dspy.Prediction:
    """The prediction with labels in the place of its own values."""
    return dspy.Prediction(**{**dict(pred.items()), **labels})


def _same_form(written: object, label: object) -> bool:
    """Whether a value is of the same form as a label: of the same type, both numbers, or None."""
    both_numbers = isinstance(written, Real) and isinstance(label, Real)
    return written is None or both_numbers or isinstance(written, type(label)) or isinstance(label, type(written))


def _place(error: UnmeasuredError) -> str:
    """Where in the metric the error was raised: file and line of the innermost frame."""
    trace = (error.__cause__ or error).__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{error}" if trace is None else f"{error} {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _not_finite(value: object, at: str = "", depth: int = 0) -> Iterator[str]:
    """The numbers in a value that are not finite, each with its place, e.g. ``field.part = nan``."""
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
    if isinstance(value, Decimal):
        if not value.is_finite():
            yield f"{at} = {value}"
        return
    for name, part in _parts(value):
        yield from _not_finite(part, f"{at}.{name}" if at else str(name), depth + 1)


def _is_odd(value: Complex) -> bool:
    try:
        number = complex(value)
    except OverflowError:  # an int that is larger than any float is finite
        return False
    return not (math.isfinite(number.real) and math.isfinite(number.imag))


def _reads_odd(text: str) -> bool:
    """Whether ``float()`` of a text, as a metric may read it, is nan or an infinity."""
    try:
        return not math.isfinite(float(text))
    except ValueError:
        return False


def _parts(value: object) -> Iterator[tuple[object, object]]:
    """(name or index, value) of what a value consists of."""
    if isinstance(value, Mapping | dspy.Example):  # a dspy.Prediction is an Example, and no Mapping
        yield from value.items()
    elif isinstance(value, BaseModel):
        yield from ((name, getattr(value, name)) for name in type(value).model_fields)
        yield from (value.model_extra or {}).items()
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((part.name, getattr(value, part.name)) for part in fields(value))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    elif hasattr(value, "tolist") and hasattr(value, "dtype"):  # an array
        yield from enumerate(value.tolist() if isinstance(value.tolist(), list) else [value.tolist()])
