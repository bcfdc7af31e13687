"""Checks that stop a run before it trains on invalid rollouts."""

from collections.abc import Sequence
from pathlib import Path

from dspy_fst.errors import MeasurementError, TrainingError
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.types import Rollout, WeightsVersion


def refuse_stale(where: str, rollouts: Sequence[Rollout], published: WeightsVersion) -> None:
    """
    Args:
        where: The purpose of the rollouts, e.g. ``"step 3"``.

    Raises:
        TrainingError: calls were sampled by other weights than those that were published for this purpose.
    """
    sampled_by = {call.weights for rollout in rollouts for call in rollout.calls}
    if stale := sorted(sampled_by - {published}):
        raise TrainingError(
            f"{where}: calls were sampled by weights {stale} and not by {published}, which were published for it; "
            "nothing was learnt from them"
        )


def refuse_unmeasured(step: int, rollouts: Sequence[Rollout], max_masked_share: float, run_dir: Path) -> None:
    """
    Raises:
        MeasurementError: more than ``max_masked_share`` of the rollouts were not measured.
    """
    masked = OutcomeCounts.over(rollout.outcome for rollout in rollouts).masked
    if masked.total() > max_masked_share * len(rollouts):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in masked.most_common())
        raise MeasurementError(
            f"step {step}: {masked.total()} of {len(rollouts)} rollouts measured nothing ({reasons}), more than "
            f"max_masked_share={max_masked_share:g}. Nothing was learnt from them; mend the cause and "
            f"compile again with run_dir={str(run_dir)!r} to go on"
        )
