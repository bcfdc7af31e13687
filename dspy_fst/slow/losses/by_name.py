"""The losses by the name that the setting ``loss`` gives them, and the band of importance weights of a recipe."""

import math

from dspy_fst.slow.losses.cispo import CISPO
from dspy_fst.slow.losses.dapo import DAPO
from dspy_fst.slow.losses.dr_grpo import dr_grpo
from dspy_fst.slow.losses.grpo import GRPO
from dspy_fst.slow.losses.gspo import GSPO
from dspy_fst.slow.losses.loss import Band, Loss
from dspy_fst.slow.losses.rft import RFT
from dspy_fst.slow.losses.rloo import RLOO
from dspy_fst.slow.training_settings import TrainingSettings


def loss_of(settings: TrainingSettings, longest_reply: int = 1) -> Loss:
    """The loss of a recipe.

    Args:
        longest_reply: ``max_tokens``, the constant length of dr_grpo.
    """
    losses = {"cispo": CISPO, "grpo": GRPO, "dapo": DAPO, "gspo": GSPO, "rloo": RLOO, "rft": RFT}
    return dr_grpo(longest_reply) if settings.loss == "dr_grpo" else losses[settings.loss]


def band_of(settings: TrainingSettings) -> Band:
    """The importance weights that the loss of a recipe lets through.

    >>> band_of(TrainingSettings(loss="dapo"))
    Band(low=0.8, high=1.28)
    """
    loss = loss_of(settings)
    if loss.clip is None:
        return Band(0.0, settings.importance_cap if settings.loss == "cispo" else math.inf)
    low, high = settings.clip or loss.clip
    return Band(1 - low, 1 + high)
