"""Rejection-sampling fine-tuning: the best rollouts of each problem become supervised data, the others are left out.

    L = -mean  log pi_theta(y_t)        over all tokens of the rollouts that were kept

Kept are the rollouts with the best score of their group, equals included (RAFT, arXiv 2304.06767, keeps one; RFT,
2308.01825, section 3.3, keeps all that are right, which under right-or-wrong scores is the same set). A flat group is
dropped as under every loss, since nothing says whether all of it is right. What is rejected is counted. A reply that
was sampled twice counts twice; RFT keeps one of each.

There is no baseline, no advantage below 0, no clip and no importance weight. Mean: over all tokens of the batch, as
supervised trainers do it.
"""

from typing import TYPE_CHECKING

from dspy_fst.slow.losses.dapo import token_weights
from dspy_fst.slow.losses.loss import Band, Loss, Tokens

if TYPE_CHECKING:
    from torch import Tensor


def value(logprobs: "Tensor", tokens: Tokens, _: Band) -> "Tensor":
    return -(tokens.weights * logprobs).sum()


RFT = Loss(value, token_weights, "best", None)
