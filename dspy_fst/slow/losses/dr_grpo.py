"""Dr. GRPO ("Understanding R1-Zero-Like Training", arXiv 2503.20783, section 3.2): GRPO without its two divisions.

The loss of a token and the clip are GRPO's. Two things are left out, because they favour long wrong answers and
problems that are nearly solved or nearly hopeless: the division by a rollout's own length, and the one by the group's
standard deviation.

Advantage: centred, ``score - mean``. Mean: over the rollouts of a problem, then over problems; a rollout is the sum of
its tokens over a constant length, ``max_tokens`` (the largest of the trained predictors). AdamW is blind to that
constant but for its epsilon; it matters to ``max_grad_norm`` and to the loss that is reported. The KL term has the same
weights.
"""

from collections.abc import Sequence
from functools import partial

from dspy_fst.slow.losses import rloo
from dspy_fst.slow.losses.grpo import CLIP, clipped, value
from dspy_fst.slow.losses.loss import Loss
from dspy_fst.types import Row


def token_weights(rows: Sequence[Row], length: int) -> list[float]:
    """``1 / (problems * rollouts of the row's problem * length)``, over rollouts with a row."""
    return [weight / length for weight in rloo.token_weights(rows)]


def dr_grpo(length: int) -> Loss:
    """The loss whose constant is ``length`` tokens."""
    return Loss(value, partial(token_weights, length=length), "centred", clipped, CLIP)
