"""Rollouts under the program's own texts, for the KL to the start under the seed (``seed_kl_coefficient``). Pure."""

from collections.abc import Callable, Sequence

from dspy_fst.types import Call, SeedKLCall, SeedKLRollout


def seed_kl_calls(rollouts: Sequence[SeedKLRollout], is_trained: Callable[[Call], bool]) -> tuple[SeedKLCall, ...]:
    """Their trained calls whose prompt the start can read."""
    return tuple(
        SeedKLCall(call, prompt)
        for seed in rollouts
        for call, prompt in zip(seed.rollout.calls, seed.start_prompts, strict=True)
        if prompt is not None and is_trained(call)
    )


def seed_kl_counts(
    rollouts: Sequence[SeedKLRollout], kept: Sequence[SeedKLCall], is_trained: Callable[[Call], bool]
) -> dict[str, int]:
    """What they hold, and what was left out; empty without such rollouts."""
    if not rollouts:
        return {}
    calls = sum(is_trained(call) for seed in rollouts for call in seed.rollout.calls)
    return {
        "held_rollouts": len(rollouts),
        "held_calls": len(kept),
        "held_calls_unread": calls - len(kept),
        "held_tokens": sum(seed.rollout.tokens for seed in rollouts),
    }
