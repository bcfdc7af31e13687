"""What a long reply costs a rollout: DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4, Eq. 13).

A reply of up to ``max_tokens`` less a last part costs nothing. In that part the cost grows linearly, and at
``max_tokens`` it is ``overlong_penalty``. The cost is taken off the reward before advantages are computed. The metric,
GEPA's scores, validation and the reward in a step's report never see it.
"""

from collections.abc import Callable

from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Call

Penalty = Callable[[Call], float]
"""What one call takes off the scores that it is credited with; 0 or more."""


def penalty_of(settings: TrainingSettings) -> Penalty | None:
    """The penalty of a recipe; None when it has none."""
    most, share = settings.overlong_penalty, settings.overlong_share
    return (lambda call: overlong(call, most, share)) if most else None


def overlong(call: Call, most: float, share: float) -> float:
    """The penalty of one call.

    >>> reply = Call("answer", (1,), (7,) * 90, (-1.0,) * 90, "stop", "step-000000", max_tokens=100)
    >>> overlong(reply, 1.0, 0.2)  # half of the last 20 tokens
    0.5

    Args:
        most: Of a reply of ``max_tokens`` tokens, in units of the reward.
        share: The last part of ``max_tokens``, in which the penalty grows.

    Returns:
        0 for a call without ``max_tokens``.
    """
    if call.max_tokens is None:
        return 0.0
    last = share * call.max_tokens
    beyond = len(call.completion_ids) - (call.max_tokens - last)
    return most * min(max(beyond / last, 0.0), 1.0)
