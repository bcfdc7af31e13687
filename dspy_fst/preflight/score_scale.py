"""Warns when the metric gives more than ``perfect_score``, so that partly right rollouts count as solved.

A metric from 0 to 100 with the default ``perfect_score=1`` leaves nothing to reflect on: the search skips perfect
rollouts, and an occasional 0 hides this from other warnings. The metric is called here and may use a paid client, so
only the start of a run, or ``check --measure``, does this.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import dspy
from dspy.utils.callback import BaseCallback

from dspy_fst.rollout.reward import Reward, UnmeasuredError

LABELLED = 2
"""Examples whose labels are scored as if they were predictions (ours)."""


class _CallsLMError(BaseException):
    """The metric calls an LM. Not an Exception, so that no metric handles it as a failed judge."""


class _RefuseLMCalls(BaseCallback):
    def on_lm_start(self, call_id: str, instance: object, inputs: dict[str, object]) -> None:
        raise _CallsLMError


def scores_of_labels(metric: Callable[..., object], examples: Sequence[dspy.Example]) -> list[float]:
    """The metric's scores of the labels of the first examples, which are right answers.

    Examples whose labels the metric cannot read are left out, and so are those for which it would call a DSPy LM.
    """
    scores, reward = [], Reward(metric)
    for example in examples[:LABELLED]:
        labels = dict(example.labels().items())
        with suppress(UnmeasuredError, _CallsLMError), dspy.context(callbacks=[_RefuseLMCalls()]):
            scores.append(reward(example, dspy.Prediction(**labels), []).value)
    return scores


def scale_warnings(scores: Sequence[float], perfect: float) -> list[str]:
    """A sentence when a score is above the recipe's ``perfect_score``."""
    if not scores or max(scores) <= perfect:
        return []
    return [
        f"the metric gives up to {max(scores):g} on the first examples, and perfect_score={perfect:g}: a rollout that "
        f"scores {perfect:g} or more counts as solved and is not reflected on. Set perfect_score to the metric's best "
        "score, or scale the metric"
    ]
