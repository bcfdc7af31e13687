"""Does the metric give more than ``perfect_score``? Then every rollout that is half right counts as solved.

A metric from 0 to 100 under the default of 1 leaves nothing to reflect on: a search skips what is perfect, and an
occasional 0 hides that from every warning. The metric is called here, and may ask whom it likes through a client of its
own: only a start, or a check that was told to measure, comes here.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import dspy
from dspy.utils.callback import BaseCallback

from dspy_fst.rollout.reward import Reward, UnmeasuredError

LABELLED = 2
"""Examples whose labels are scored as if they were predictions (ours)."""


class _AsksError(BaseException):
    """The metric asks an LM; not an Exception, so that no metric takes it for its judge's answer."""


class _NobodyIsAsked(BaseCallback):
    def on_lm_start(self, call_id: str, instance: object, inputs: dict[str, object]) -> None:
        raise _AsksError


def of_labels(metric: Callable[..., object], examples: Sequence[dspy.Example]) -> list[float]:
    """What the metric gives for the labels of the first examples, which are right answers.

    Nothing where the metric cannot read them, or asks an LM of DSPy's: that would be paid for.
    """
    scores, reward = [], Reward(metric)
    for example in examples[:LABELLED]:
        labels = dict(example.labels().items())
        with suppress(UnmeasuredError, _AsksError), dspy.context(callbacks=[_NobodyIsAsked()]):
            scores.append(reward(example, dspy.Prediction(**labels), []).value)
    return scores


def scale_warnings(scores: Sequence[float], perfect: float) -> list[str]:
    """A sentence when a score is above what the recipe calls perfect."""
    if not scores or max(scores) <= perfect:
        return []
    return [
        f"the metric gives up to {max(scores):g} on the first examples, and perfect_score={perfect:g}: a rollout that "
        f"scores {perfect:g} or more counts as solved and is not reflected on. Set perfect_score to the metric's best "
        "score, or scale the metric"
    ]
