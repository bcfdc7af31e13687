"""Rollouts as JSON and back, for a journal. A rollout comes back exactly as it was, or is not written at all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.rollout.parse_failures import failed_reply, form_of
from dspy_fst.types import PREDICTOR_TAG, Candidate, Rollout

NATIVE = (str, int, float, bool, type(None))
"""Types whose values JSON gives back as they were; so are lists, and dicts with text keys, of these."""


class _OpaqueError(Exception):
    """A value that JSON would not give back as it was."""


def rollouts_to_json(rollouts: Sequence[Rollout]) -> list[dict[str, object]] | None:
    """The rollouts without their calls; None if one holds a value that JSON cannot give back.

    Typed objects in a prediction (pydantic models, images, histories) are such values.
    """
    try:
        return [_rollout(rollout) for rollout in rollouts]
    except _OpaqueError:
        return None


def _rollout(rollout: Rollout) -> dict[str, object]:
    return {
        "problem": rollout.problem,
        "reward": rollout.reward,
        **rollout.outcome.as_fields(),
        "prediction": _prediction(rollout.prediction),
        "trace": [_entry(*entry) for entry in rollout.trace],
    }


def _entry(predictor: object, inputs: Mapping[str, object], output: object) -> dict[str, object]:
    name = getattr(predictor, PREDICTOR_TAG, None)  # None for one that was made during the run, e.g. in a dspy.Flex
    return {"predictor": name, "inputs": _native(dict(inputs)), "output": _prediction(output)}


def _prediction(value: object) -> dict[str, object] | None:
    if value is None:
        return None
    if isinstance(value, FailedPrediction):
        return {"failed": value.completion_text, "format_reward": value.format_reward, "form": form_of(value)}
    if isinstance(value, dspy.Prediction) and type(value) is dspy.Prediction:
        completions = getattr(value, "_completions", None)
        if completions is not None and len(completions) > 1:
            raise _OpaqueError
        return {"fields": _native(dict(value.items())), "sampled": completions is not None}
    raise _OpaqueError


def _native(value: object) -> object:
    if type(value) in NATIVE:
        return value
    if isinstance(value, list) and type(value) is list:
        return [_native(item) for item in value]
    if isinstance(value, dict) and type(value) is dict and all(type(key) is str for key in value):
        return {key: _native(item) for key, item in value.items()}
    raise _OpaqueError


def rollouts_from_json(
    data: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate], speaking: Callable[[Candidate], dspy.Module]
) -> list[Rollout]:
    """The rollouts again, without calls.

    Args:
        data: What `rollouts_to_json` gave.
        candidates: The candidate of each rollout.
        speaking: Returns the program under a candidate, its predictors tagged. Traces refer to these predictors, and to
            None in the place of one that was made during the run.
    """
    rollouts = []
    for item, candidate in zip(data, candidates, strict=True):
        predictors = dict(speaking(candidate).named_predictors()) if item["trace"] else {}
        trace = tuple(
            (predictors.get(entry["predictor"]), entry["inputs"], _predicted(entry["output"]))
            for entry in item["trace"]
        )
        outcome, prediction = Outcome.of_fields(item), _predicted(item["prediction"])
        rollouts.append(
            Rollout(item["problem"], candidate, (), item["reward"], outcome, prediction=prediction, trace=trace)
        )
    return rollouts


def _predicted(data: Mapping[str, Any] | None) -> "dspy.Prediction | FailedPrediction | None":
    if data is None:
        return None
    if "failed" in data:
        return failed_reply(data["failed"], data.get("form", ""), data["format_reward"])
    if data["sampled"]:
        return dspy.Prediction.from_completions({name: [value] for name, value in data["fields"].items()})
    return dspy.Prediction(**data["fields"])
