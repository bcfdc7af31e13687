"""Warns of adapters that a program sets itself while it runs, found in the first rollouts.

The run does not record such an adapter: the program's code sets it again wherever the program is called. Users of the
weights without that code must set it themselves.
"""

from collections.abc import Sequence

import dspy

from dspy_fst.rollout.chat_adapters import describe
from dspy_fst.types import Rollout


def own_adapters(rollouts: Sequence[Rollout], kept: str) -> str | None:
    """A sentence that names the predictors with another adapter than the program's; None without any.

    Args:
        rollouts: Made with ``anew``, so that the calls of their predictors are recorded.
        kept: The description of the adapter that the compiled program will keep.
    """
    calls = [call for rollout in rollouts for call in rollout.asked if not _advises(call.adapter)]
    adapters = {(call.name, str(describe(call.adapter))) for call in calls}
    others = sorted((name, adapter) for name, adapter in adapters if adapter != kept)
    if not others:
        return None
    through = "; ".join(f"predictor {name!r} speaks through {adapter}" for name, adapter in others)
    return (
        f"{through}, which the program sets itself while it runs. Training calls it so too. The compiled program keeps "
        f"{kept} for all other calls"
    )


def _advises(adapter: dspy.Adapter) -> bool:
    """Whether dspy.Refine made this adapter, around the current one, to add its advice."""
    return type(adapter).__module__ == dspy.Refine.__module__
