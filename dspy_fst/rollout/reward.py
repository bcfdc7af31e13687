"""A DSPy metric as a reward: a finite score and feedback, or the reason why there is none."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dspy

Metric = Callable[..., Any]


class UnmeasuredError(Exception):
    """The metric gave no usable score; the message is the reason."""


@dataclass(frozen=True)
class Score:
    """What a metric said of one prediction."""

    value: float
    feedback: str = ""


class Reward:
    """Calls a metric of DSPy's or of GEPA's signature.

    ``(gold, pred, trace=None) -> float | bool`` and
    ``(gold, pred, trace, pred_name, pred_trace) -> float | dspy.Prediction(score=..., feedback=...)`` both work.
    """

    def __init__(self, metric: Metric):
        self.metric = metric
        self._arity = len(_positional(metric))

    def __call__(
        self,
        gold: dspy.Example,
        pred: Any,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> Score:
        """Score one prediction.

        Raises:
            UnmeasuredError: the metric raised, or returned something that is not a finite number.
        """
        arguments = (gold, pred, trace, pred_name, pred_trace)[: self._arity]
        try:
            returned = self.metric(*arguments)
        except Exception as error:
            raise UnmeasuredError(f"metric raised {type(error).__name__}") from error
        return _as_score(returned)


def _as_score(returned: Any) -> Score:
    feedback = ""
    if isinstance(returned, dspy.Prediction) or (isinstance(returned, dict) and "score" in returned):
        feedback = str(returned.get("feedback") or "")
        returned = returned["score"]
    try:
        value = float(returned)
    except (TypeError, ValueError):
        raise UnmeasuredError(f"metric returned {type(returned).__name__}") from None
    if not math.isfinite(value):
        raise UnmeasuredError(f"metric returned {value}")
    return Score(value, feedback)


def _positional(metric: Metric) -> list[inspect.Parameter]:
    """The parameters that Reward can fill, in order; at most five."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(metric).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return [inspect.Parameter(name, kinds[0]) for name in ("gold", "pred", "trace", "pred_name", "pred_trace")]
    return [parameter for parameter in parameters if parameter.kind in kinds][:5]


def metric_fault(metric: Any) -> str | None:
    """What is wrong with the metric's signature, as a sentence; None when nothing is."""
    if not callable(metric):
        return f"metric: {metric!r} is not callable; pass a function (gold, pred, trace=None, ...)"
    try:
        parameters = list(inspect.signature(metric).parameters.values())
    except (TypeError, ValueError):
        return None
    fillable = _positional(metric)
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    name = getattr(metric, "__name__", type(metric).__name__)
    if len(fillable) < 2 or any(parameter not in fillable for parameter in required if fillable != parameters):
        shown = ", ".join(parameter.name for parameter in parameters)
        return (
            f"metric: {name}({shown}) has the wrong signature; it must take (gold, pred), then optionally trace, "
            "pred_name and pred_trace, and need nothing else"
        )
    return None
