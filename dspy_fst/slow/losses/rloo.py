"""RLOO (arXiv 2402.14740, after Kool et al. 2019): REINFORCE with the mean of the other rollouts as baseline.

    L = -mean  A * log pi_theta(rollout),        A = score - mean score of the others of its group

The gradient is unbiased: no division by a length or a standard deviation, no clip, and no importance weight. The paper
finds that clipping hardly ever acts in this setting. It holds for rollouts of the very weights that are trained, so
with ``updates_per_batch`` above 1 later steps learn from rollouts of older weights as if they were their own.

Advantage: leave-one-out. Mean: over the rollouts of a problem, then over problems; a rollout is the sum of its tokens,
so loss and gradient are as many times larger than a mean over tokens as a rollout has tokens. The KL term has the same
weights.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspy_fst.slow.losses.loss import Band, Loss, Tokens
from dspy_fst.types import Row

if TYPE_CHECKING:
    from torch import Tensor


def value(logprobs: "Tensor", tokens: Tokens, _: Band) -> "Tensor":
    return -(tokens.weights * tokens.advantages * logprobs).sum()


def token_weights(rows: Sequence[Row]) -> list[float]:
    """``1 / (problems * rollouts of the row's problem)``, over rollouts with a row."""
    rollouts = Counter(compared for compared, _ in {(row.compared, row.rollout) for row in rows})
    return [1 / (len(rollouts) * rollouts[row.compared]) for row in rows]


RLOO = Loss(value, token_weights, "leave_one_out", None)
