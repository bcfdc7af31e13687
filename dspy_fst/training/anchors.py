"""How many anchors the searches of a run can have, before it begins: a cycle's problems may be fewer than was asked."""

from collections.abc import Sequence

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.rollout.components import problem_mark
from dspy_fst.training.fingerprints import fingerprint
from dspy_fst.training.plan import Plan
from dspy_fst.types import Population


def origin_of(student: dspy.Module, policy: PolicyLM) -> str:
    """What a continued training starts from; empty at the base, whose shuffles are the seed's alone."""
    carried = getattr(student, "population", None)
    if not isinstance(carried, Population):
        return ""
    return fingerprint([policy.checkpoint.version, [member.digest for member in carried.members]])


def fewest_anchors(
    config: FSTConfig, trainset: Sequence[dspy.Example], origin: str = "", *, by_inputs: bool = False
) -> int:
    """Anchors of the search that has the fewest; where none searches, those that one would have.

    Args:
        trainset: At least ``problems_per_step`` examples.
        origin: See `Plan`.
        by_inputs: Whether problems with the same inputs count once, as to an optimizer in GEPA's place.
    """
    plan = Plan(config, len(trainset), origin)
    searches = [cycle.index for cycle in plan.cycles if cycle.search_budget] or [0]
    found = [plan.anchors(cycle) for cycle in searches]
    if by_inputs:
        return min(len({problem_mark(trainset[index]) or index for index in anchors}) for anchors in found)
    return min(map(len, found))


def anchor_warnings(config: FSTConfig, anchors: int) -> list[str]:
    """A sentence for each setting that asks for more anchors than there are.

    Args:
        anchors: Of the search with the fewest.
    """
    if config.method == "rl":
        return []
    told = []
    if config.anchors is not None and config.anchors > anchors:
        told.append(
            f"anchors={config.anchors}: a cycle has as few as {anchors} different problems, and a search takes its "
            f"anchors of these; leave anchors out, or use {config.more_anchors(anchors)}"
        )
    at_once = max(1, anchors // config.reflection_minibatch)
    if config.proposals_at_once > at_once:
        told.append(
            f"proposals_at_once={config.proposals_at_once}: {anchors} anchors have {at_once} minibatches of "
            f"reflection_minibatch={config.reflection_minibatch}, so a search makes {at_once} proposals at a time; use "
            f"proposals_at_once={at_once}, or {config.more_anchors(anchors)}"
        )
    return told
