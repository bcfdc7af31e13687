"""DAPO (arXiv 2503.14476, Eq. 8): GRPO whose clip reaches further up, and whose tokens all weigh the same.

The loss of a token is GRPO's. The clip is 0.2 below and 0.28 above 1 ("clip-higher", sections 3.1 and 4.1), so that an
unlikely token with an advantage above 0 may grow further.

Advantage: standardized over the group. Mean: over all tokens of the batch, as the libraries do it (trl's ``dapo``,
verl's ``token-mean``). Eq. 8 as it is written divides by the tokens of each problem, which is `slow.losses.cispo`'s
mean. DAPO's other parts are settings of their own: ``resample_flat`` (dynamic sampling), ``overlong_penalty`` (Eq. 13),
``updates_per_batch`` (16). It has no KL term: set ``kl_coefficient=0`` for that.
"""

from collections.abc import Sequence

from dspy_fst.slow.losses.grpo import clipped, value
from dspy_fst.slow.losses.loss import Loss
from dspy_fst.types import Row

CLIP = (0.2, 0.28)


def token_weights(rows: Sequence[Row]) -> list[float]:
    """``1 / tokens of the batch``."""
    tokens = sum(len(row.completion_ids) for row in rows)
    return [1 / tokens for _ in rows]


DAPO = Loss(value, token_weights, "standardized", clipped, CLIP)
