"""Replies that do not parse. Each is asked for once, and none is hidden when the program handles the error itself."""

import logging
from collections.abc import Sequence
from typing import Any

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError

from dspy_fst.rollout.call_recorder import is_recorded
from dspy_fst.rollout.outages import leaves_a_hole
from dspy_fst.rollout.second_call import no_second_call
from dspy_fst.types import PREDICTOR_TAG

logger = logging.getLogger(__name__)
Entry = tuple[Any, dict[str, Any], Any]
"""DSPy's trace entry: (predictor, inputs, prediction)."""


FORM = "form"
"""Attribute of a FailedPrediction: what the adapter in force had asked of the reply's form."""


def failed_reply(text: str, form: str, format_reward: float | None = None) -> FailedPrediction:
    """DSPy's entry of a reply that did not parse, and the form that was asked for."""
    failed = FailedPrediction(text, format_reward)
    setattr(failed, FORM, form)
    return failed


def form_of(failed: FailedPrediction) -> str:
    """What was asked of the reply's form; empty where that is not known."""
    return str(getattr(failed, FORM, ""))


def form_asked_for(predictor: dspy.Predict) -> str:
    """What the adapter in force tells the LM of the reply's form, as a reflection shows it; empty where it cannot say.

    Asked in the call's own context: a program may set an adapter for a single call.
    """
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    try:
        messages = adapter.format(predictor.signature, [], {})
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    except Exception as error:  # an adapter of the user's may need its inputs; the failed parse stays what it is
        logger.debug("%s shows no form without inputs: %r", type(adapter).__name__, error)
        return ""


class ParseFailures(BaseCallback):
    """DSPy's callback for the time of one rollout; as a callback it also sees adapters that the program sets itself.

    Args:
        trace: The rollout's own; what a program traces by itself (BestOfN) joins it later.
    """

    def __init__(self, trace: Sequence[Entry]):
        self._trace = trace
        self._asked: set[str] = set()
        self._running: dict[str, tuple[dspy.Predict, dict[str, Any]]] = {}
        self._failed: list[tuple[int, Entry]] = []
        self._lost: list[tuple[str, AdapterParseError]] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if is_recorded(instance):
            self._asked.add(call_id)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """No second call of the policy, also where its LM allows one outside of rollouts. A frozen LM is asked as it is
        outside of a rollout."""
        if call_id in self._asked:
            self._asked.discard(call_id)
            no_second_call()

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if isinstance(instance, dspy.Predict) and hasattr(instance, PREDICTOR_TAG):
            self._running[call_id] = (instance, inputs["kwargs"])

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        predictor, given = self._running.pop(call_id, (None, {}))
        if predictor is None or not isinstance(exception, AdapterParseError):
            return
        if is_recorded(given.get("lm") or predictor.lm or dspy.settings.lm):
            inputs = {name: value for name, value in given.items() if name in predictor.signature.input_fields}
            entry = (predictor, inputs, failed_reply(str(exception.lm_response), form_asked_for(predictor)))
            self._failed.append((len(self._trace), entry))
            self._lost.append((getattr(predictor, PREDICTOR_TAG), exception))

    def behind(self) -> tuple[str, AdapterParseError] | None:
        """The predictor whose reply did not parse, and left a hole that the program fell over; else None."""
        return next((lost for lost in self._lost if leaves_a_hole(lost[1])), None)

    def forget(self) -> None:
        """Let go of the exceptions, whose tracebacks hold the rollout's copy of the program."""
        self._lost.clear()

    def in_trace(self) -> tuple[Entry, ...]:
        """The rollout's trace with the failed parses in their places."""
        whole = list(self._trace)
        for place, entry in reversed(self._failed):
            whole.insert(place, entry)
        return tuple(whole)
