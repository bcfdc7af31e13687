"""Decides how a rollout ended: scored, failed through the policy, or masked. No other module decides it.

The policy's failures are scored: a reply that does not parse, a context that overflows, a program that trips over
what the policy wrote, a metric that cannot read it. A run that did not measure the policy is masked: an outage, a
failure of a frozen LM, a program that fails before the policy was asked, a metric that fails by itself.
"""

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import dspy
from dspy.predict.flex.bridge import BridgeRuntime
from dspy.primitives.code_interpreter import CodeExecutionError, CodeInterpreterError
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError

from dspy_fst.outcomes.outcome import CONTEXT, PARSE, Outcome
from dspy_fst.rollout.blame import Blame
from dspy_fst.rollout.call_recorder import OUTSIDE, Recording, is_recorded
from dspy_fst.rollout.outages import Outages
from dspy_fst.rollout.parse_failures import ParseFailures
from dspy_fst.rollout.parse_reasons import feedback_on
from dspy_fst.rollout.reward import Reward, UnmeasuredError
from dspy_fst.types import PREDICTOR_TAG, Call, Candidate, Problem, Rollout

STARTS = ("_create_interpreter", "install")
"""What dspy.Flex 3.4 calls before it gives its source to the interpreter."""


@dataclass(frozen=True)
class Judgement:
    """What a rollout earned, and what is known of its end."""

    reward: float | None
    outcome: Outcome
    failed_in: str | None = None
    prediction: dspy.Prediction | None = None
    predictor_scores: Mapping[str, float] = field(default_factory=dict)

    def rollout(
        self,
        problem: Problem,
        candidate: Candidate,
        calls: tuple[Call, ...],
        trace: tuple[Any, ...],
        asked: tuple[Any, ...],
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
    """Decides the outcome of one rollout from what was recorded in it."""

    recording: Recording
    parse_failures: ParseFailures
    outages: Outages
    failure_score: float
    format_failure_score: float

    def raised(self, error: BaseException) -> Judgement:
        """The program raised."""
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
        if isinstance(error, OSError):  # ConnectionError and TimeoutError among them: a tool's outage
            return _masked(f"outage: {name}")
        if _is_the_source_s(error):
            return self._failed("source", f"{name}: {error}")
        if isinstance(error, CodeInterpreterError):
            return _masked(f"interpreter: {name}", str(error))
        if outage := self.outages.behind(error):
            return _masked(outage, repr(error))
        if self.recording.last_predictor in (None, OUTSIDE):  # it failed before the policy had said anything
            return _masked(f"program: {name}", repr(error))
        if lost := self.parse_failures.behind():
            return self._unparsed(lost[1], lost[0])
        return self._failed(name, f"The program failed: {error}")

    def returned(
        self, example: dspy.Example, prediction: Any, trace: list[Any], reward: Reward, blame: Blame
    ) -> Judgement:
        """The program returned.

        Args:
            trace: The finished run's.
        """
        if prediction is None:  # BestOfN and Refine, when no try gave one
            return self._nothing()
        try:
            score = reward(example, prediction, trace, apart=self.recording.apart())
        except UnmeasuredError as error:
            return self._unmeasured(example, prediction, trace, error, blame)
        outcome = Outcome("scored", detail=score.feedback)
        return Judgement(score.value, outcome, prediction=prediction, predictor_scores=score.predictor_scores)

    def forget(self) -> None:
        """Let go of exceptions that hold the rollout's copy of the program."""
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
        self, example: dspy.Example, prediction: Any, trace: list[Any], error: UnmeasuredError, blame: Blame
    ) -> Judgement:
        if outage := self.outages.behind():  # a hole in the prediction: the metric fell over it
            return _masked(outage, str(error))
        if at_fault := blame.of_policy(example, prediction, trace, error):
            return self._failed(*at_fault)
        detail = repr(error.__cause__) if error.__cause__ else ""
        return replace(_masked(str(error), detail), prediction=prediction)


def _masked(reason: str, detail: str = "") -> Judgement:
    return Judgement(None, Outcome("masked", reason, detail))


def _is_the_source_s(error: BaseException) -> bool:
    """Whether the source of a dspy.Flex is to blame: it raised, gave what dspy.Flex refuses, or ended its interpreter.

    Not where the interpreter could not be started: the source had not been given to it.
    """
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if BridgeRuntime.forward.__code__ not in codes:
        return isinstance(error, CodeExecutionError)
    inside = codes[codes.index(BridgeRuntime.forward.__code__) + 1 :]
    return not inside or inside[0].co_name not in STARTS


def failing_predictor(error: BaseException) -> tuple[str | None, bool]:
    """Name of the innermost tagged predictor on the exception's way, found in its traceback (None: there is none), and
    whether it speaks with an LM whose calls are not recorded."""
    name, frozen = None, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        predictor = frame.f_locals.get("self")
        if isinstance(predictor, dspy.Predict) and hasattr(predictor, PREDICTOR_TAG):
            name, frozen = getattr(predictor, PREDICTOR_TAG), not is_recorded(predictor.lm or dspy.settings.lm)
    return name, frozen
