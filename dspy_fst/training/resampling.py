"""Flat groups of a step, replaced by groups of other problems: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2).

A group whose rollouts all scored alike gives no gradient, so a batch with many of them is a small batch. DAPO samples
other problems until the batch is full. Here ``resample_flat`` bounds the rounds, so that the plan can say what a step
costs at most. Nothing is hidden: the flat groups stay among the step's groups, and with them in its counts, rewards and
costs. `dspy_fst.slow.credit` drops them as it always does.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

from dspy_fst.run.learning import AT_THE_TOP
from dspy_fst.types import Batch, Group

Credited = Callable[[Sequence[Group]], Batch]
"""`dspy_fst.slow.credit.credit` with the settings of a run."""


def refilled(
    groups: Sequence[Group],
    others: Sequence[int],
    rounds: int,
    is_flat: Callable[[Group], bool],
    sample: Callable[[Sequence[int]], list[Group]],
) -> list[Group]:
    """The groups of a step, and those that were sampled in place of flat ones.

    In each round every group of the round before that is flat is replaced by the group of one other problem, as long as
    there are any. A group that was not measured is not replaced: what kept it from being measured would meet the next
    group too.

    Args:
        groups: Of the step's own problems.
        others: Indices of other problems, in the order in which they are taken.
        rounds: At most so many.
        is_flat: Whether nothing is learnt from a group because its rollouts scored alike.
        sample: Makes a group for each index.

    Returns:
        ``groups``, then the new ones. Flat groups are among both.
    """
    made, newest = [*groups], [*groups]
    for _ in range(rounds):
        count = sum(map(is_flat, newest))
        wanted, others = others[:count], others[count:]
        if not wanted:
            break
        newest = sample(wanted)
        made += newest
    return made


def is_flat(group: Group, credited: Credited) -> bool:
    """Whether nothing is learnt from a group because its rollouts scored alike. A group with fewer than two measured
    rollouts is not flat: it was not measured.
    """
    counts = credited([group]).counts
    return counts["flat_groups"] > 0 and not counts["live_groups"]


def resampling_counts(
    groups: Sequence[Group], planned: int, is_flat: Callable[[Group], bool], worst: float, best: float
) -> Counter[str]:
    """What became of a step's groups under ``resample_flat``, as counts of its report.

    Example: ``{"resampled_groups": 3, "resampled_rollouts": 24, "dropped: all right": 16, "dropped: all wrong": 8}``.

    Args:
        groups: As `refilled` returned them.
        planned: The first so many are of the step's own problems.
        is_flat: As in `refilled`.
        worst: Reward of a failed rollout.
        best: Reward of a perfect one.

    Returns:
        ``resampled_groups`` and their ``resampled_rollouts``, and under ``dropped: REASON`` the rollouts of all flat
        groups.
    """
    new = groups[planned:]
    counts = Counter(resampled_groups=len(new), resampled_rollouts=sum(len(group.rollouts) for group in new))
    for group in filter(is_flat, groups):
        counts[f"dropped: {_reason(group, worst, best)}"] += len(group.rollouts)
    return counts


def _reason(group: Group, worst: float, best: float) -> str:
    reward, near = fmean(group.rewards), AT_THE_TOP * (best - worst)
    # The worst reward is as near as the best one may be (ours).
    return "all right" if reward >= best - near else "all wrong" if reward <= worst + near else "all alike"
