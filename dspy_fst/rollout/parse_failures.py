"""Replies that do not parse. Each is requested once, and stays in the trace even if the program handles the error.

The feedback on such a reply names the field whose value its type does not allow, and what is allowed.
"""

import enum
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dspy
import pydantic
from dspy.teleprompt.bootstrap_trace import FailedPrediction
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError

from dspy_fst.rollout.call_recorder import is_recorded, no_second_call
from dspy_fst.rollout.dspy_release import default_adapter, in_words
from dspy_fst.rollout.outages import leaves_a_hole
from dspy_fst.types import PREDICTOR_TAG, Rollout

logger = logging.getLogger(__name__)
Entry = tuple[dspy.Predict, dict[str, Any], "dspy.Prediction | FailedPrediction"]
"""An entry of DSPy's trace: (predictor, inputs, prediction)."""
FORM = "form"
"""Attribute of a FailedPrediction: what the adapter in force had said about the reply's form."""
WRONG_VALUE = "The reply could not be parsed: field "
"""How the feedback on such a reply begins. A warning shows this line."""
LONGEST = 100
"""Characters of a value that are shown (ours)."""


def parsed_calls(rollout: Rollout) -> Iterator[tuple[str, dict[str, Any], dspy.Prediction]]:
    """(predictor, inputs, prediction) of each reply that parsed. A predictor that was made during the run, e.g. in a
    dspy.Flex, has no name, so its calls are left out."""
    for predictor, inputs, said in rollout.trace:
        name: str | None = getattr(predictor, PREDICTOR_TAG, None)
        if name is not None and not isinstance(said, FailedPrediction):
            yield name, inputs, said


def failed_reply(text: str, form: str, format_reward: float | None = None) -> FailedPrediction:
    """DSPy's entry for a reply that did not parse, with the form that was asked for."""
    failed = FailedPrediction(text, format_reward)
    setattr(failed, FORM, form)
    return failed


def form_of(failed: FailedPrediction) -> str:
    """What was said about the reply's form; empty if that is not known."""
    return str(getattr(failed, FORM, ""))


def form_asked_for(predictor: dspy.Predict) -> str:
    """What the adapter in force tells the LM about the reply's form, as a reflection shows it; empty if it cannot say.

    To be called in the call's own context: a program may set an adapter for a single call.
    """
    adapter = dspy.settings.adapter or default_adapter()
    try:
        return in_words(adapter.format(predictor.signature, [], {}))
    except Exception as error:  # a user's adapter may need its inputs; the failed parse counts all the same
        logger.debug("%s shows no form without inputs: %r", type(adapter).__name__, error)
        return ""


class ParseFailures(BaseCallback):
    """DSPy's callback during one rollout. A callback also sees the adapters that the program sets itself.

    Args:
        trace: The rollout's trace. What a program traces by itself (BestOfN) is added to it later.
    """

    def __init__(self, trace: Sequence[Entry]):
        self._trace = trace
        self._asked: set[str] = set()
        """Calls of the policy that run."""
        self._running: dict[str, tuple[dspy.Predict, dict[str, Any]]] = {}
        self._failed: list[tuple[int, Entry]] = []
        """(place in the trace, entry of a reply that did not parse)."""
        self._lost: list[tuple[str, AdapterParseError]] = []
        """(predictor's name, its error)."""

    def on_lm_start(self, call_id: str, instance: object, inputs: Mapping[str, object]) -> None:
        if is_recorded(instance):
            self._asked.add(call_id)

    def on_lm_end(self, call_id: str, outputs: object, exception: BaseException | None = None) -> None:
        """Prevent a second call of the policy, even if its LM allows one outside of rollouts; not of a frozen LM."""
        if call_id in self._asked:
            self._asked.discard(call_id)
            no_second_call()

    def on_module_start(self, call_id: str, instance: object, inputs: Mapping[str, Any]) -> None:
        if isinstance(instance, dspy.Predict) and hasattr(instance, PREDICTOR_TAG):
            self._running[call_id] = (instance, inputs["kwargs"])

    def on_module_end(self, call_id: str, outputs: object, exception: BaseException | None = None) -> None:
        predictor, given = self._running.pop(call_id, (None, {}))
        if predictor is None or not isinstance(exception, AdapterParseError):
            return
        if is_recorded(given.get("lm") or predictor.lm or dspy.settings.lm):
            inputs = {name: value for name, value in given.items() if name in predictor.signature.input_fields}
            entry = (predictor, inputs, failed_reply(str(exception.lm_response), form_asked_for(predictor)))
            self._failed.append((len(self._trace), entry))
            self._lost.append((getattr(predictor, PREDICTOR_TAG), exception))

    def behind(self) -> tuple[str, AdapterParseError] | None:
        """(predictor's name, error) of a failed parse that left a hole in the program's results; else None."""
        return next((lost for lost in self._lost if leaves_a_hole(lost[1])), None)

    def forget(self) -> None:
        """Drop the exceptions, whose tracebacks hold the rollout's copy of the program."""
        self._lost.clear()

    def in_trace(self) -> tuple[Entry, ...]:
        """The rollout's trace, with the failed parses in their places."""
        whole = list(self._trace)
        for place, entry in reversed(self._failed):
            whole.insert(place, entry)
        return tuple(whole)


# ---- why a reply did not parse --------------------------------------------------------------------


def feedback_on(error: AdapterParseError) -> str:
    """The feedback on a reply that did not parse: the reason if a value was wrong, then DSPy's message.

    DSPy's adapters raise the same error for every failed parse. What pydantic or DSPy said about the value is that
    error's cause, or its context if the adapter sets no cause (ChatAdapter of DSPy 3.4).
    """
    reason = _reason(error)
    return f"{WRONG_VALUE}{reason}\n{error}" if reason else f"The reply could not be parsed: {error}"


def _reason(error: AdapterParseError) -> str:
    """E.g. ``"'mood': 'so-so' came, and it should be 'good' or 'bad'"``; empty if no value was wrong."""
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
    """The output field whose value DSPy could not convert. XMLAdapter names the field by its definition."""
    message = str(error)
    for name, field in error.signature.output_fields.items():
        if re.match(rf"Failed to parse field {re.escape(name)}\b", message) or message.startswith(
            f"Failed to parse field {field} with value"
        ):
            return str(name)
    return None


def _came(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
