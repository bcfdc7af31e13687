"""A DSPy metric as a reward: a finite score and feedback, or the reason why there is none.

A metric measures a finished run and is no part of it. It may call an LM as a judge, even the policy. Such calls are in
no trace, do not count as calls of the program, and are not trained on.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from dspy_fst.errors import is_signal
from dspy_fst.rollout.call_recorder import SETTING, Apart, Recording

Metric = Callable[..., object]
"""A user's metric, in one of the forms that `Reward` calls. What it returns is checked at every call."""


class UnmeasuredError(Exception):
    """The metric gave no usable score; the message is the reason."""

    asked_an_lm = False
    """Whether the metric had called an LM. What it could not read may then be a judge's words."""


class NotFiniteScoreError(UnmeasuredError):
    """The metric returned nan or an infinity."""


@dataclass(frozen=True)
class Score:
    """What a metric said of one prediction."""

    value: float
    feedback: str = ""
    predictor_scores: Mapping[str, float] = field(default_factory=dict)
    predictor_feedback: Mapping[str, str] = field(default_factory=dict)

    def feedback_for(self, predictor: str) -> str:
        """The feedback on this predictor, or on the whole run if it has none."""
        return self.predictor_feedback.get(predictor) or self.feedback


BY_PREDICTOR = ("predictor_scores", "predictor_feedback")
"""What a metric may return about single predictors, besides ``score`` and ``feedback``."""


class LMUse(BaseCallback):
    """DSPy's callback during one call of a metric: notes whether the metric calls an LM."""

    def __init__(self) -> None:
        self.seen = False

    def on_lm_start(self, call_id: str, instance: object, inputs: Mapping[str, object]) -> None:
        self.seen = True

    def on_module_start(self, call_id: str, instance: object, inputs: Mapping[str, object]) -> None:
        self.seen = self.seen or isinstance(instance, dspy.Predict)


class Reward:
    """Calls a metric that has DSPy's or GEPA's signature.

    ``(gold, pred, trace=None) -> float | bool`` and
    ``(gold, pred, trace, pred_name, pred_trace) -> float | dspy.Prediction(score=..., feedback=...)`` both work. The
    prediction may also hold ``predictor_scores={name: float}`` and ``predictor_feedback={name: text}``.

    Args:
        metric: The user's metric.
        predictors: The program's predictors. Only they may get scores and feedback of their own. With None, names are
            not checked.
        peers: Examples of the same set. Their labels are other answers of the right form, which
            `dspy_fst.rollout.outcome_rules` tries on a metric that raised.
    """

    def __init__(self, metric: Metric, predictors: Collection[str] | None = None, peers: Sequence[dspy.Example] = ()):
        self.metric, self._predictors, self.peers = metric, predictors, peers
        self._roles = _filled_by_name(metric)

    @property
    def identity(self) -> str:
        """The metric's name and a digest of its source, which show when a run is resumed under another metric."""
        named = self.metric if hasattr(self.metric, "__qualname__") else type(self.metric)
        try:
            source = inspect.getsource(named)
        except (OSError, TypeError):
            source = ""
        return f"{named.__module__}.{named.__qualname__} {hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def __call__(
        self,
        gold: dspy.Example,
        pred: object,
        trace: Iterable[object] | None = None,
        pred_name: str | None = None,
        pred_trace: object = None,
        apart: Apart | None = None,
    ) -> Score:
        """Score one prediction.

        Args:
            gold: The example.
            pred: What the program returned.
            trace: The trace of the finished run. The metric gets a copy.
            pred_name: The predictor that GEPA asks about.
            pred_trace: The part of the trace that belongs to this predictor.
            apart: Gives the metric's own calls of the policy their seeds. By default these depend on the prompts alone.

        Raises:
            UnmeasuredError: the metric raised, or returned something other than a finite number, or named a predictor
                that the program does not have.
        """
        finished = None if trace is None else list(trace)
        known: dict[str, object] = {"trace": finished, "pred_name": pred_name, "pred_trace": pred_trace}
        lm_use = LMUse()
        settings = {SETTING: apart or Recording(0).apart(), "trace": [], "caller_modules": [], "disable_history": True}
        try:
            with dspy.context(**settings, callbacks=[*dspy.settings.callbacks, lm_use]):
                returned = self._returned(gold, pred, {name: known[role] for name, role in self._roles.items()})
            return self._score_of(returned)
        except UnmeasuredError as error:
            error.asked_an_lm = lm_use.seen
            raise

    def _returned(self, gold: dspy.Example, pred: object, given: Mapping[str, object]) -> object:
        try:
            return self.metric(gold, pred, **given)
        except BaseException as error:
            if is_signal(error):
                raise
            raise UnmeasuredError(f"metric raised {type(error).__name__}") from error

    def _score_of(self, returned: object) -> Score:
        try:
            return self._as_score(returned)
        except UnmeasuredError:
            raise
        except Exception as error:  # what a metric returns may be of any class
            what = f"{type(returned).__name__} that is no score ({type(error).__name__})"
            raise UnmeasuredError(f"metric returned {what}") from None

    def _as_score(self, returned: object) -> Score:
        if not (isinstance(returned, dspy.Prediction) or (isinstance(returned, dict) and "score" in returned)):
            return Score(_finite(returned))
        if unknown := sorted(
            name for name in dict(returned) if name.startswith("predictor_") and name not in BY_PREDICTOR
        ):
            raise UnmeasuredError(f"metric returned {unknown[0]}; it may return {' and '.join(BY_PREDICTOR)}")
        scores, feedback = (self._by_predictor(returned, field_name) for field_name in BY_PREDICTOR)
        return Score(
            value=_finite(returned["score"]),
            feedback=str(returned.get("feedback") or ""),
            predictor_scores={name: _finite(score, f" for {name!r}") for name, score in scores.items()},
            predictor_feedback={name: str(text or "") for name, text in feedback.items()},
        )

    def _by_predictor(self, returned: "dspy.Prediction | dict[str, object]", field_name: str) -> Mapping[str, object]:
        """What the metric returned about single predictors in a field; empty when it returned nothing there."""
        given: object = returned.get(field_name)
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise UnmeasuredError(f"metric returned {field_name} as {type(given).__name__}, not as a dict by predictor")
        known = given.keys() if self._predictors is None else self._predictors
        if strangers := sorted(str(name) for name in given if name not in known):
            existing = ValueError(f"the program's predictors are {', '.join(sorted(known))}")
            raise UnmeasuredError(f"metric returned {field_name} of {strangers}, no predictors") from existing
        return given


def _finite(given: Any, of_whom: str = "") -> float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        raise UnmeasuredError(f"metric returned {type(given).__name__}{of_whom}") from None
    if not math.isfinite(value):
        raise NotFiniteScoreError(f"metric returned {value}{of_whom}")
    return value


ROLES = ("trace", "pred_name", "pred_trace")
"""What a metric may take after (gold, pred), in GEPA's order."""


def _parameters(metric: Metric) -> list[inspect.Parameter]:
    """The metric's parameters. For a module such as dspy.evaluate.SemanticF1 these are the parameters of forward."""
    function = metric.forward if isinstance(metric, dspy.Module) else metric
    return list(inspect.signature(function).parameters.values())


def _filled_by_name(metric: Metric) -> dict[str, str]:
    """The metric's parameter -> the role that it is filled with.

    A parameter gets a role by its name, or by its position if it has no default. An option such as ``frac=1.0`` in the
    position of ``pred_name`` keeps its own value.
    """
    parameters = _parameters(metric)
    beyond = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    filled = {p.name: p.name for p in parameters if p.name in ROLES}
    for parameter, role in zip(beyond, ROLES, strict=False):
        if parameter.default is parameter.empty and parameter.name not in filled:
            filled[parameter.name] = role
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        filled |= {role: role for role in ROLES if role not in filled}
    return filled


def metric_fault(metric: object) -> str | None:
    """What is wrong with a metric's signature, as a sentence; None when nothing is."""
    if not callable(metric):
        return f"metric: {metric!r} is not callable; pass a function (gold, pred, trace=None, ...)"
    try:
        parameters = _parameters(metric)
    except (TypeError, ValueError):
        return None
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    enough = len(places) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    filled = _filled_by_name(metric)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    unfilled = [
        p.name
        for p in parameters
        if p not in places[:2] and p.default is p.empty and p.kind not in variadic and p.name not in filled
    ]
    if enough and not unfilled:
        return None
    name = getattr(metric, "__name__", type(metric).__name__)
    return (
        f"metric: {name}({', '.join(p.name for p in parameters)}) has the wrong signature; it must take (gold, pred), "
        "then optionally trace, pred_name and pred_trace, and need nothing else"
    )


Feedback = Callable[[dspy.Example, object, Iterable[object] | None, str, object], str]
"""(example, prediction, trace, predictor's name, predictor's trace) -> text."""


def feedback_by(reward: Reward) -> Feedback:
    """What a reflection LM reads about one predictor's part in a run: the metric's feedback, else its score."""

    def feedback(
        example: dspy.Example, pred: object, trace: Iterable[object] | None, name: str, pred_trace: object
    ) -> str:
        try:
            score = reward(example, pred, trace, name, pred_trace)
        except UnmeasuredError as error:
            return f"No feedback: {error}."
        return score.feedback_for(name) or f"This run scored {score.value:g}."

    return feedback
