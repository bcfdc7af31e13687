"""GRPO (DeepSeekMath, arXiv 2402.03300, Eq. 3): PPO's clipped objective with a group's scores in place of a critic.

    L = -sum_t  w_t * min(rho_t * A, clip(rho_t, 1 - low, 1 + high) * A),   rho_t = pi_theta(y_t) / pi_behaviour(y_t)

A token whose weight is above the band and whose advantage is above 0 has no gradient, nor has one below the band with
an advantage below 0. All others keep theirs. The paper does not state the clip; 0.2 on both sides is PPO's (1707.06347,
section 6.1).

Advantage: standardized over the group. Mean: over the tokens of a rollout, then over the rollouts of a problem, then
over problems, so a token of a long rollout weighs less. A rollout of several replies is one sequence here, as its
reward is one. The paper's KL term is an estimate from one sample, ours is exact (`slow.head.kl_divergence`).
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspy_fst.slow.losses.loss import Band, Loss, Tokens
from dspy_fst.types import Row

if TYPE_CHECKING:
    from torch import Tensor

CLIP = (0.2, 0.2)


def value(logprobs: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    return clipped_objective((logprobs - tokens.behaviour).exp(), tokens, band)


def clipped_objective(ratios: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    """PPO's objective as a loss, from importance weights of shape (N,) that carry the gradient."""
    within = ratios.clamp(band.low, band.high)
    return -(tokens.weights * (ratios * tokens.advantages).minimum(within * tokens.advantages)).sum()


def clipped(logprobs: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    return without_gradient((logprobs - tokens.behaviour).exp(), tokens, band)


def without_gradient(ratios: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    """The tokens that the clip takes the gradient from, shape (N,)."""
    above, below = ratios > band.high, ratios < band.low
    return (above & (tokens.advantages > 0)) | (below & (tokens.advantages < 0))


def token_weights(rows: Sequence[Row]) -> list[float]:
    """``1 / (problems * rollouts of the row's problem * tokens of its rollout)``, over rollouts with a row."""
    tokens = Counter[tuple[tuple[int, str], int]]()
    for row in rows:
        tokens[row.compared, row.rollout] += len(row.completion_ids)
    rollouts = Counter(compared for compared, _ in tokens)
    return [1 / (len(rollouts) * rollouts[row.compared] * tokens[row.compared, row.rollout]) for row in rows]


GRPO = Loss(value, token_weights, "standardized", clipped, CLIP)
