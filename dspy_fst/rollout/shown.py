"""Rollouts as people read them: what went into each module, what came out, what it earned."""

from collections.abc import Mapping, Sequence
from typing import Any

from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.types import PREDICTOR_TAG, Group, Rollout

LONGEST = 2_000
"""Characters of one text; the middle of a longer one is left out."""


def telling(groups: Sequence[Group]) -> list[Rollout]:
    """A few rollouts that say most about a step: the best and the worst of its group with the widest rewards."""
    widest = max(groups, key=_spread, default=None)
    if widest is None:
        return []
    ranked = sorted(widest.rollouts, key=lambda rollout: (rollout.reward is not None, rollout.reward or 0.0))
    return [ranked[-1], ranked[0]] if len(ranked) > 1 else ranked


def _spread(group: Group) -> float:
    rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
    return max(rewards) - min(rewards) if rewards else -1.0


def shown(rollout: Rollout) -> dict[str, Any]:
    """The rollout as plain data: ``problem``, ``candidate``, ``reward``, ``feedback``, ``mask``, ``failure``,
    ``tokens`` and ``modules`` (``name``, ``inputs``, and ``outputs`` or the ``reply`` that did not parse)."""
    return {
        "problem": rollout.problem,
        "candidate": rollout.candidate.digest,
        "reward": rollout.reward,
        "feedback": _short(rollout.feedback),
        "mask": rollout.mask,
        "failure": rollout.failure,
        "tokens": rollout.tokens,
        "modules": [_module(*entry) for entry in rollout.trace],
    }


def _module(predictor: Any, inputs: Mapping[str, Any], output: Any) -> dict[str, Any]:
    said = {"name": getattr(predictor, PREDICTOR_TAG, "?"), "inputs": _texts(inputs)}
    if isinstance(output, FailedPrediction):
        return {**said, "reply": _short(output.completion_text)}
    return {**said, "outputs": _texts(dict(output.items()))}


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: _short(str(value)) for name, value in fields.items()}


def _short(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"
