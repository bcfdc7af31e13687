"""Adapters that a program sets itself while it runs: seen in the first rollouts, and told.

Such an adapter is in no record of the run: the program's code sets it again wherever the program is called. Whoever
uses the weights without that code must set it himself.
"""

from collections.abc import Sequence

import dspy

from dspy_fst.rollout.adapters import describe
from dspy_fst.types import Rollout


def own_adapters(rollouts: Sequence[Rollout], kept: str) -> str | None:
    """A sentence that names the predictors which speak through another adapter than the program's.

    Args:
        rollouts: Played with ``anew``, so that their calls of predictors are known.
        kept: The adapter that the compiled program will keep, described.
    """
    asked = [call for rollout in rollouts for call in rollout.asked if not _advises(call.adapter)]
    found = {(call.name, str(describe(call.adapter))) for call in asked}
    own = sorted((name, adapter) for name, adapter in found if adapter != kept)
    if not own:
        return None
    through = "; ".join(f"predictor {name!r} speaks through {adapter}" for name, adapter in own)
    return (
        f"{through}, which the program sets itself while it runs. It is trained so, and called so wherever this code "
        f"calls it; {kept} is kept for all others"
    )


def _advises(adapter: dspy.Adapter) -> bool:
    """Whether it is the one that dspy.Refine puts round the one in force, to tell its advice."""
    return type(adapter).__module__ == dspy.Refine.__module__
