"""GSPO (arXiv 2507.18071, Eq. 5 to 7): GRPO whose importance weight belongs to a whole reply.

    s = (pi_theta(y) / pi_behaviour(y)) ** (1 / |y|)        the geometric mean over the reply's tokens
    L = -mean  min(s * A, clip(s, 1 - low, 1 + high) * A)

It is computed token by token with ``s_t = sg(s) * pi_theta(y_t) / sg(pi_theta(y_t))`` (GSPO-token, Eq. 13 and 14). Its
value and gradient are the same, because all tokens of a reply have one advantage. The clip is 3e-4 below and 4e-4 above
1 (section 5.1): the mean over a reply moves far less than one token does. A reply is clipped as a whole.

Advantage: standardized over the group. Mean: over the tokens of a reply, the replies of a rollout, the rollouts of a
problem, then over problems. The weight is of a reply rather than of a rollout: a reply is what was sampled for one
prompt, and between two replies of a rollout stands what the program made of the first.

The band is so narrow that bfloat16 noise between engine and trainer can leave it. Where ``capped_share`` is high in
updates on fresh rollouts, widen ``clip``.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspy_fst.slow.losses.grpo import clipped_objective, without_gradient
from dspy_fst.slow.losses.loss import Band, Loss, Tokens
from dspy_fst.types import Row

if TYPE_CHECKING:
    from torch import Tensor

CLIP = (3e-4, 4e-4)


def value(logprobs: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    assert tokens.reply_log_ratios is not None
    return clipped_objective((tokens.reply_log_ratios + logprobs - logprobs.detach()).exp(), tokens, band)


def clipped(_: "Tensor", tokens: Tokens, band: Band) -> "Tensor":
    assert tokens.reply_log_ratios is not None
    return without_gradient(tokens.reply_log_ratios.exp(), tokens, band)


def token_weights(rows: Sequence[Row]) -> list[float]:
    """``1 / (problems * rollouts of the row's problem * rows of its rollout * tokens of the row)``."""
    replies = Counter((row.compared, row.rollout) for row in rows)
    rollouts = Counter(compared for compared, _ in replies)
    shares = [1 / (len(rollouts) * rollouts[row.compared] * replies[row.compared, row.rollout]) for row in rows]
    return [share / len(row.completion_ids) for share, row in zip(shares, rows, strict=True)]


GSPO = Loss(value, token_weights, "standardized", clipped, CLIP, reads_replies=True)
