"""How rollouts are made and failures scored."""

from pydantic import Field

from dspy_fst.recipe.declared import Settings


class RolloutSettings(Settings):
    """What a `Rollouter` is set by."""

    failure_score: float = 0.0
    """Reward of a rollout that failed because of the policy (DSPy's default)."""
    format_failure_score: float = 0.0
    """Reward of a reply that does not parse (ours; mmGRPO sets it below ``failure_score``)."""
    num_threads: int = Field(default=64, ge=1)
    """Rollouts in flight (ours)."""
    rollout_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a rollout is masked (ours)."""
