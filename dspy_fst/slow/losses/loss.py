"""What a loss is: the protocol of the files beside this one. Nothing here imports torch, as settings read it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from dspy_fst.types import Row

if TYPE_CHECKING:
    from torch import Tensor

Advantage = Literal["standardized", "centred", "leave_one_out", "best"]
"""How the score of a rollout becomes its advantage, among the n scores that it is compared with:

- ``"standardized"``: ``(score - mean) / std``
- ``"centred"``: ``score - mean``
- ``"leave_one_out"``: ``score - mean of the others``, which is ``n / (n - 1)`` of the centred one
- ``"best"``: 1 for the best score and its equals; the others are left out
"""


class Band(NamedTuple):
    """The importance weights that a loss lets through, e.g. ``Band(0.8, 1.2)``: bounds of the weight itself."""

    low: float
    high: float


@dataclass(frozen=True)
class Tokens:
    """What is known of N sampled tokens before a forward pass; every tensor has shape (N,)."""

    behaviour: "Tensor"
    """Log-probabilities with which the tokens were sampled."""
    advantages: "Tensor"
    """Of the rollout that each token belongs to."""
    weights: "Tensor"
    """Factor of each token's loss, see `Loss.token_weights`."""
    reply_log_ratios: "Tensor | None" = None
    """Mean of ``log pi_theta - log pi_behaviour`` over the reply of each token, without a gradient; for a loss that
    reads whole replies."""


@dataclass(frozen=True)
class Loss:
    """What the name of a loss decides."""

    value: Callable[["Tensor", Tokens, Band], "Tensor"]
    """``(log pi_theta of the tokens, shape (N,), with a gradient; the tokens; the band) -> scalar``."""
    token_weights: Callable[[Sequence[Row]], list[float]]
    """All rows of a batch -> the weight of each token of each row."""
    advantage: Advantage
    clipped: Callable[["Tensor", Tokens, Band], "Tensor"] | None
    """``(log pi_theta, shape (N,); the tokens; the band) -> the tokens whose weight was clipped, shape (N,)``. None: it
    clips nothing."""
    clip: tuple[float, float] | None = None
    """Distance of the band's ends from 1, if ``clip`` sets none; None: the loss has no such band."""
    reads_replies: bool = False
    """Whether it needs ``Tokens.reply_log_ratios``."""
