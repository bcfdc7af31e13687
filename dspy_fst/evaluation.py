"""What training brought: the table of {base, trained weights} x {seed, evolved instructions}, and the drift."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_fst.compiled import policy_of, start_of
from dspy_fst.engine.base import Checkpoint
from dspy_fst.policy import PolicyLM
from dspy_fst.rollout.player import Player, PlayerSettings, Task
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.texts import read_texts
from dspy_fst.slow.trainer import Trainer, TrainerSettings
from dspy_fst.types import Candidate, Problem, Rollout

CELLS = (
    "base weights, seed instructions",
    "trained weights, seed instructions",
    "base weights, evolved instructions",
    "trained weights, evolved instructions",
)


@dataclass(frozen=True)
class Estimate:
    """Score on held-out problems, k rollouts each."""

    mean_at_k: float
    """Mean over problems of the mean over k rollouts."""
    standard_error: float
    """Of that mean, over problems."""
    best_at_k: float
    """Mean over problems of the best of k rollouts."""
    problems: int
    k: int
    masked: int
    """Rollouts that were not measured and enter no figure."""


@dataclass(frozen=True)
class Drift:
    """How far the trained weights moved from the base on held-out prompts, on replies that they sampled."""

    per_token: float
    """Mean exact KL(trained || base) of a completion token, in nats."""
    per_rollout: float
    """Mean over rollouts of the KL summed over a rollout's completion tokens."""


@dataclass(frozen=True)
class TwoByTwo:
    """The four cells and the drift under both instructions."""

    cells: dict[str, Estimate]
    """Keyed by CELLS."""
    drift: dict[str, Drift]
    """Keyed by ``"seed instructions"`` and ``"evolved instructions"``."""


def estimate(rollouts: Sequence[Rollout], k: int) -> Estimate:
    """Summarise k rollouts for each problem.

    Raises:
        ValueError: nothing was measured.
    """
    rewards: dict[int, list[float]] = {}
    for rollout in rollouts:
        if rollout.reward is not None:
            rewards.setdefault(rollout.problem, []).append(rollout.reward)
    if not rewards:
        raise ValueError(f"none of {len(rollouts)} rollouts was measured: {sorted({str(r.mask) for r in rollouts})}")
    means = [statistics.fmean(of) for of in rewards.values()]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return Estimate(
        mean_at_k=statistics.fmean(means),
        standard_error=spread / math.sqrt(len(means)),
        best_at_k=statistics.fmean(max(of) for of in rewards.values()),
        problems=len(means),
        k=k,
        masked=sum(rollout.reward is None for rollout in rollouts),
    )


def two_by_two(
    student: dspy.Module,
    compiled: dspy.Module,
    testset: Sequence[dspy.Example],
    metric: Callable[..., Any],
    *,
    k: int = 4,
    seed: int = 0,
    threads: int = 64,
) -> TwoByTwo:
    """Evaluate both weights under both instructions on held-out problems, through the compiled program's engine.

    The engine serves the trained weights again when this returns.
    """
    policy = policy_of(compiled)
    player = Player(compiled, Reward(metric), PlayerSettings(threads=threads, seed=seed), policy.handle.engine.expect)
    texts = {"seed": read_texts(student), "evolved": read_texts(compiled)}
    base, trained = start_of(compiled), policy.checkpoint
    rollouts = {}
    try:
        for weights, checkpoint in (("base", base), ("trained", trained)):
            for name, candidate in texts.items():
                rollouts[weights, name] = _play(player, policy, checkpoint, candidate, testset, k)
    finally:
        policy.handle.engine.load(trained)
    cells = {f"{weights} weights, {name} instructions": estimate(made, k) for (weights, name), made in rollouts.items()}
    drift = {f"{name} instructions": drift_of(trained, base, rollouts["trained", name]) for name in texts}
    return TwoByTwo({name: cells[name] for name in CELLS}, drift)


def _play(
    player: Player,
    policy: PolicyLM,
    checkpoint: Checkpoint,
    candidate: Candidate,
    testset: Sequence[dspy.Example],
    k: int,
) -> list[Rollout]:
    engine = policy.handle.engine
    if engine.weights != checkpoint.version:
        engine.load(checkpoint)
    tasks = [Task(Problem(i, example), candidate, s) for i, example in enumerate(testset) for s in range(k)]
    return player.play(tasks, f"evaluation {checkpoint.version}")


def drift_of(trained: Checkpoint, base: Checkpoint, rollouts: Sequence[Rollout]) -> Drift:
    """KL(trained || base) on these rollouts' calls, which the trained weights sampled."""
    measured = [rollout for rollout in rollouts if rollout.reward is not None]
    calls = [call for rollout in measured for call in rollout.calls if call.temperature > 0]
    trainer = Trainer(trained.path, TrainerSettings(learning_rate=1.0), reference=base.path)
    by_call: list[list[float]] = trainer.kl_by_call(calls)
    total = math.fsum(math.fsum(values) for values in by_call)
    return Drift(per_token=total / sum(map(len, by_call)), per_rollout=total / len(measured))
