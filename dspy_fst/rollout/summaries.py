"""Rollouts as people read them: the inputs and outputs of each module, and the reward."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.outcomes.outcome import PARSE, Outcome
from dspy_fst.rollout.parse_failures import WRONG_VALUE
from dspy_fst.types import PREDICTOR_TAG, Call, Group, Rollout

LONGEST = 2_000
"""Characters of one text that are shown; the middle of a longer text is left out."""
CALLS = 8
"""The last calls of a rollout whose replies are shown as they were sampled (ours)."""
SAID = (WRONG_VALUE, "Expected", "Actual")
"""How the lines of a feedback begin that say why a reply did not parse."""
IN_A_WARNING = 300
"""Characters of a failed reply, and of its reason, that a warning shows (ours)."""


def telling(groups: Sequence[Group], count: int = 2, draw: str = "") -> list[Rollout]:
    """A few rollouts that say the most about a step.

    The best and the worst of its group with the widest rewards come first, then one of each kind of failure or mask
    that these do not show, then drawn ones.

    Args:
        groups: The step's.
        count: At most so many.
        draw: Name of the random draw; the same name draws the same.
    """
    return list(islice(_by_what_they_say(groups, draw), count))


def _by_what_they_say(groups: Sequence[Group], draw: str) -> Iterator[Rollout]:
    """Every rollout once, the most informative first."""
    widest = max(groups, key=_spread, default=None)
    if widest is None:
        return
    ranked = sorted(widest.rollouts, key=lambda rollout: (rollout.reward is not None, rollout.reward or 0.0))
    first = [ranked[-1], ranked[0]] if len(ranked) > 1 else ranked
    yield from first
    others = [rollout for group in groups for rollout in group.rollouts if all(rollout is not one for one in first)]
    random.Random(draw).shuffle(others)
    seen = {rollout.outcome.label for rollout in first} | {Outcome("scored").label}
    later = []
    for rollout in others:
        if rollout.outcome.label in seen:
            later.append(rollout)
        else:
            seen.add(rollout.outcome.label)
            yield rollout
    yield from later


def _spread(group: Group) -> float:
    rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
    return max(rewards) - min(rewards) if rewards else -1.0


def summarize(rollout: Rollout, decode: Callable[[Sequence[int]], str] | None = None) -> dict[str, Any]:
    """The rollout as plain data.

    Args:
        rollout: What was played.
        decode: Turns sampled ids into text; without it ``calls`` is empty.

    Returns:
        ``problem``, ``candidate``, ``reward``, ``feedback``, ``mask``, ``failure``, ``failed_in``, ``tokens``,
        ``modules`` (``name``, ``inputs``, and ``outputs`` or the ``reply`` that did not parse), and ``calls``
        (``predictor``, ``reply`` as it was sampled, ``cut`` off or not), of which the last `CALLS` are shown.
    """
    return {
        "problem": rollout.problem,
        "candidate": rollout.candidate.digest,
        "reward": rollout.reward,
        **rollout.outcome.as_fields(),
        "feedback": shortened(rollout.feedback),
        "failed_in": rollout.failed_in,
        "tokens": rollout.tokens,
        "modules": [_module(*entry) for entry in rollout.trace],
        "calls": [_call(call, decode) for call in rollout.calls[-CALLS:]] if decode else [],
    }


def failed_reply_of(rollouts: Sequence[Rollout]) -> str:
    """A reply of these rollouts that did not parse, with its predictor and what was missed in it; empty without one.

    Else a rollout that failed for another reason, with what was said of it.
    """
    for rollout in rollouts:
        said = next((output for _, _, output in rollout.trace if isinstance(output, FailedPrediction)), None)
        if said is not None and rollout.failure == PARSE:
            why = " ".join(line for line in rollout.feedback.splitlines() if line.startswith(SAID))
            whom = f" of {rollout.failed_in!r}" if rollout.failed_in else ""
            reply = shortened(said.completion_text, IN_A_WARNING)
            return f"A reply{whom}: {reply!r}. {shortened(why, IN_A_WARNING)}".rstrip(". ")
    failed = next((rollout for rollout in rollouts if rollout.failure not in (None, PARSE)), None)
    if failed is None:
        return ""
    return f"One failed ({failed.failure}): {shortened(' '.join(failed.feedback.split()), IN_A_WARNING)}".rstrip(". ")


def _module(predictor: Any, inputs: Mapping[str, Any], output: Any) -> dict[str, Any]:
    said = {"name": getattr(predictor, PREDICTOR_TAG, "?"), "inputs": _texts(inputs)}
    if isinstance(output, FailedPrediction):
        return {**said, "reply": shortened(output.completion_text)}
    return {**said, "outputs": _texts(dict(output.items()))}


def _call(call: Call, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    reply = shortened(decode(list(call.completion_ids)))
    return {"predictor": call.predictor, "reply": reply, "cut": call.finish_reason == "length"}


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: shortened(str(value)) for name, value in fields.items()}


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text, or its two ends.

    >>> shortened("abcdef", 4)
    'ab [...] ef'
    """
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"
