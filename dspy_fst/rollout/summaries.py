"""Rollouts for people to read: the inputs and outputs of each module, and the reward."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.outcomes.outcome import PARSE, Outcome
from dspy_fst.rollout.parse_failures import WRONG_VALUE
from dspy_fst.types import PREDICTOR_TAG, Call, Group, Rollout

LONGEST = 2_000
"""Most characters of a text that are shown. Of a longer text the middle is left out."""
CALLS = 8
"""How many of a rollout's last calls are shown with the reply as it was sampled (ours)."""
REASON_LINES = (WRONG_VALUE, "Expected", "Actual")
"""Beginnings of the lines in a feedback that say why a reply did not parse."""
IN_A_WARNING = 300
"""Most characters of a failed reply, and of the reason, in a warning (ours)."""


def telling(groups: Sequence[Group], count: int = 2, draw: str = "") -> list[Rollout]:
    """A few rollouts that show the most about a step.

    First come the best and the worst of the group with the widest range of rewards, then one for each other kind of
    failure or mask, then random ones.

    Args:
        groups: The step's groups.
        count: How many rollouts to return at most.
        draw: Name of the random draw. The same name gives the same rollouts.
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
    others = [rollout for group in groups for rollout in group.rollouts if all(rollout is not shown for shown in first)]
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
    rewards = group.rewards
    return max(rewards) - min(rewards) if rewards else -1.0


def summarize(rollout: Rollout, decode: Callable[[Sequence[int]], str] | None = None) -> dict[str, object]:
    """The rollout as plain data.

    Args:
        rollout: The rollout.
        decode: Turns sampled ids into text. Without it ``calls`` is empty.

    Returns:
        ``problem``, ``candidate``, ``reward``, ``feedback``, ``mask``, ``failure``, ``failed_in``, ``tokens``;
        ``modules`` with ``name``, ``inputs``, and ``outputs`` or the ``reply`` that did not parse; ``calls``, the last
        `CALLS` of them, with ``predictor``, the ``reply`` as it was sampled, and whether it was ``cut`` off.
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
    """A reply that did not parse, with its predictor and the reason.

    If there is none in these rollouts: another failure, with its feedback. Empty if none failed.
    """
    for rollout in rollouts:
        unparsed = next((output for _, _, output in rollout.trace if isinstance(output, FailedPrediction)), None)
        if unparsed is not None and rollout.failure == PARSE:
            reason = " ".join(line for line in rollout.feedback.splitlines() if line.startswith(REASON_LINES))
            predictor = f" of {rollout.failed_in!r}" if rollout.failed_in else ""
            reply = shortened(unparsed.completion_text, IN_A_WARNING)
            return f"A reply{predictor}: {reply!r}. {shortened(reason, IN_A_WARNING)}".rstrip(". ")
    failed = next((rollout for rollout in rollouts if rollout.failure not in (None, PARSE)), None)
    if failed is None:
        return ""
    return f"One failed ({failed.failure}): {shortened(' '.join(failed.feedback.split()), IN_A_WARNING)}".rstrip(". ")


def _module(
    predictor: object, inputs: Mapping[str, object], output: dspy.Prediction | FailedPrediction
) -> dict[str, object]:
    call = {"name": getattr(predictor, PREDICTOR_TAG, "?"), "inputs": _texts(inputs)}
    if isinstance(output, FailedPrediction):
        return {**call, "reply": shortened(output.completion_text)}
    return {**call, "outputs": _texts(dict(output.items()))}


def _call(call: Call, decode: Callable[[Sequence[int]], str]) -> dict[str, object]:
    reply = shortened(decode(list(call.completion_ids)))
    return {"predictor": call.predictor, "reply": reply, "cut": call.finish_reason == "length"}


def _texts(fields: Mapping[str, object]) -> dict[str, str]:
    return {name: shortened(str(value)) for name, value in fields.items()}


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text, or its two ends.

    >>> shortened("abcdef", 4)
    'ab [...] ef'
    """
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"
