"""CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4 and 5): the importance weight is capped, not the update.

    L = -sum_t  w_t * sg(min(rho_t, cap)) * A * log pi_theta(y_t),        rho_t = pi_theta(y_t) / pi_behaviour(y_t)

Unlike with PPO's clip, every token keeps its gradient; only the size of its weight is bounded, from above alone
(``importance_cap``; FST, 2605.12484, App. D: 4). Other libraries write the same number as ``epsilon_high``, ``1 +
clip`` or a pair of bounds.

Advantage: standardized over the group (FST, Eq. 3). Mean: over the tokens of a problem, then over problems (FST, Eq.
4). A problem without a row is absent from the mean rather than a zero in it, so the weights sum to 1 and the step size
does not shrink as groups go flat.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspy_fst.slow.losses.loss import Band, Loss, Tokens
from dspy_fst.types import Row

if TYPE_CHECKING:
    from torch import Tensor


def value(logprobs: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    weights = importance_weights(logprobs, tokens, band)
    return -(tokens.weights * weights * tokens.advantages * logprobs).sum()


def importance_weights(logprobs: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    """``min(rho, cap)`` of each token, shape (N,), without a gradient. There is no lower bound."""
    return (logprobs.detach() - tokens.behaviour).exp().clamp(max=band.high)


def clipped(logprobs: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    return (logprobs - tokens.behaviour).exp() >= band.high


def token_weights(rows: Sequence[Row]) -> list[float]:
    """``1 / (problems * tokens of the row's problem)``. Under ``baseline="candidate"`` the rollouts of each candidate
    count as a problem of their own."""
    tokens = Counter[tuple[int, str]]()
    for row in rows:
        tokens[row.compared] += len(row.completion_ids)
    return [1 / (len(tokens) * tokens[row.compared]) for row in rows]


CISPO = Loss(value, token_weights, "standardized", clipped)
