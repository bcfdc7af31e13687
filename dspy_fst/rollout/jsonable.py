"""Rollouts as JSON and back. A rollout comes back exactly as it was, or is not written at all.

A journal needs what a search asks of a rollout. What trains on it needs its calls too, with the exact ids and
log-probabilities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.rollout.call_recorder import tag_predictors
from dspy_fst.rollout.components import with_texts
from dspy_fst.rollout.parse_failures import failed_reply, form_of
from dspy_fst.types import PREDICTOR_TAG, Call, Candidate, Rollout

NATIVE = (str, int, float, bool, type(None))
"""Types whose values JSON gives back as they were; so are lists, and dicts with text keys, of these."""


class _OpaqueError(Exception):
    """A value that JSON would not give back as it was."""


def rollouts_to_json(rollouts: Sequence[Rollout], *, calls: bool = False) -> list[dict[str, object]] | None:
    """The rollouts; None if one holds a value that JSON cannot give back.

    Typed objects in a prediction (pydantic models, images, histories) are such values.

    Args:
        calls: Keep their calls, with what is credited to them.
    """
    try:
        return [{**_rollout(rollout), **(_sampled(rollout) if calls else {})} for rollout in rollouts]
    except _OpaqueError:
        return None


def trainable_to_json(rollout: Rollout) -> dict[str, object]:
    """All of a rollout that an update learns from; prediction and trace as well, where JSON can give them back."""
    try:
        shown = _rollout(rollout)
    except _OpaqueError:
        shown = _rollout(replace(rollout, prediction=None, trace=()))
    return {**shown, **_sampled(rollout)}


def _sampled(rollout: Rollout) -> dict[str, object]:
    return {
        "calls": [asdict(call) for call in rollout.calls],
        "failed_in": rollout.failed_in,
        "predictor_scores": dict(rollout.predictor_scores),
    }


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
    data: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate], program: dspy.Module
) -> list[Rollout]:
    """The rollouts again, with calls where they were kept.

    Args:
        data: What `rollouts_to_json` or `trainable_to_json` gave.
        candidates: The candidate of each rollout.
        program: Traces refer to the predictors of this program under a rollout's candidate, tagged with their names,
            and to None in the place of one that was made during the run.
    """
    pairs = list(zip(data, candidates, strict=True))
    # A source that does not bind gives no program, and its rollouts have no trace that refers to one.
    programs = _tagged_programs(program, [candidate for item, candidate in pairs if item["trace"]])
    return [_again(item, candidate, programs) for item, candidate in pairs]


def _again(item: Mapping[str, Any], candidate: Candidate, programs: Mapping[str, dspy.Module]) -> Rollout:
    predictors = dict(programs[candidate.digest].named_predictors()) if item["trace"] else {}
    trace = tuple(
        (predictors.get(entry["predictor"]), entry["inputs"], _predicted(entry["output"])) for entry in item["trace"]
    )
    return Rollout(
        item["problem"],
        candidate,
        tuple(_call(call) for call in item.get("calls", ())),
        item["reward"],
        Outcome.of_fields(item),
        failed_in=item.get("failed_in"),
        predictor_scores=item.get("predictor_scores", {}),
        prediction=_predicted(item["prediction"]),
        trace=trace,
    )


def _call(data: Mapping[str, Any]) -> Call:
    lists = ("prompt_ids", "completion_ids", "logprobs")
    return Call(**{**data, **{name: tuple(data[name]) for name in lists}})


def _tagged_programs(program: dspy.Module, candidates: Sequence[Candidate]) -> dict[str, dspy.Module]:
    """Digest -> the program under a candidate, its predictors tagged with their names."""
    programs = {candidate.digest: with_texts(program, candidate) for candidate in candidates}
    for each in programs.values():
        tag_predictors(each)
    return programs


def _predicted(data: Mapping[str, Any] | None) -> "dspy.Prediction | FailedPrediction | None":
    if data is None:
        return None
    if "failed" in data:
        return failed_reply(data["failed"], data.get("form", ""), data["format_reward"])
    if data["sampled"]:
        return dspy.Prediction.from_completions({name: [value] for name, value in data["fields"].items()})
    return dspy.Prediction(**data["fields"])
