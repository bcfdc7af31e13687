"""What training achieved: scores with intervals, the table of {base, trained weights} x {seed, evolved instructions},
and the drift."""

import errno
import fcntl
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dspy
import numpy as np

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import MeasurementError
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.report.evaluated import CELLS, Drift, TwoByTwo, name_of
from dspy_fst.rollout.components import texts_like
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.files import to_jsonable, writing
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.training.result import start_of
from dspy_fst.types import Candidate, Problem, Rollout

RESAMPLES, COVERAGE = 10_000, 0.95
BLOCK = 2**20
"""Problems that are drawn at once, over resamples: some 8 MiB of indices."""
INTERVAL = f"{COVERAGE:.0%} percentile bootstrap over problems, {RESAMPLES:,} resamples"
"""Definition of an interval: how much a figure depends on which problems were drawn, for the weights of one run."""
EVALUATIONS = "evaluations.jsonl"
"""File in a run's directory with later evaluations, one JSON object a line. Reports read it."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """The score on a set of problems with k rollouts each."""

    mean_at_k: float
    """Mean over problems of the mean over k rollouts."""
    standard_error: float
    """Of that mean, over problems."""
    best_at_k: float
    """Mean over problems of the best of k rollouts."""
    problems: int
    k: int
    masked: int
    """Rollouts that were not measured; no figure includes them."""
    mean_interval: Interval | None
    """See INTERVAL; None for a single problem, which says nothing about others."""
    best_interval: Interval | None
    lost: Mapping[str, int]
    """Rollouts by `Outcome.label`, masked and failed; the failed ones are measured."""


def estimate(rollouts: Sequence[Rollout], k: int, seed: int = 0) -> Estimate:
    """Summarise k rollouts of each problem.

    Args:
        seed: Seed of the bootstrap.

    Raises:
        MeasurementError: no rollout was measured.
    """
    rewards: dict[int, list[float]] = {}
    for rollout in rollouts:
        if rollout.reward is not None:
            rewards.setdefault(rollout.problem, []).append(rollout.reward)
    lost = OutcomeCounts.over(rollout.outcome for rollout in rollouts)
    if not rewards:
        raise MeasurementError(f"none of {len(rollouts)} rollouts measured anything ({lost.words}); mend the cause")
    means = [statistics.fmean(scores) for scores in rewards.values()]
    bests = [max(scores) for scores in rewards.values()]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    mean_interval, best_interval = _intervals((means, bests), seed)
    return Estimate(
        mean_at_k=statistics.fmean(means),
        standard_error=spread / math.sqrt(len(means)),
        best_at_k=statistics.fmean(bests),
        problems=len(means),
        k=k,
        masked=lost.masked.total(),
        mean_interval=mean_interval,
        best_interval=best_interval,
        lost=lost.labels,
    )


def _intervals(figures: Sequence[Sequence[float]], seed: int) -> list[Interval | None]:
    """The interval of each figure's mean over problems. All figures use the same resampled problems."""
    values = np.array(figures).T  # (problems, figures)
    if len(values) < 2:
        return [None] * len(figures)
    draw = np.random.default_rng([*hashlib.sha256(f"{seed} bootstrap".encode()).digest()])
    at_once = max(1, BLOCK // len(values))
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    drawn = (draw.integers(len(values), size=(size, len(values))) for size in sizes)
    means = np.concatenate([values[indices].mean(axis=1) for indices in drawn])
    tail = (1 - COVERAGE) / 2
    return [(float(low), float(high)) for low, high in np.quantile(means, [tail, 1 - tail], axis=0).T]


def two_by_two(
    student: dspy.Module,
    compiled: dspy.Module,
    testset: Sequence[dspy.Example],
    metric: Callable[..., object],
    *,
    k: int = 4,
    seed: int = 0,
    threads: int = 64,
) -> TwoByTwo[Estimate]:
    """Evaluate both weights with both instructions on held-out problems, on the compiled program's engine.

    The engine serves the trained weights again when this returns.
    """
    policy = policy_of(compiled)
    reward, settings = Reward(metric, peers=testset), RolloutSettings(num_threads=threads)
    rollouter = Rollouter(compiled, reward, settings, policy.handle.engine.expect, seed=seed)
    best = compiled.population.best
    seed_texts, evolved = texts_like(best, student), texts_like(best, compiled)
    return table(rollouter, policy, start_of(compiled), seed_texts, evolved, testset, k=k)


def table(
    rollouter: Rollouter,
    policy: PolicyLM,
    base: Checkpoint,
    seed: Candidate,
    evolved: Candidate,
    examples: Sequence[dspy.Example],
    *,
    k: int,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
) -> TwoByTwo[Estimate]:
    """`two_by_two` with a given rollouter. ``policy`` holds the trained weights; the engine serves them at the end."""
    texts, trained = {"seed": seed, "evolved": evolved}, policy.checkpoint
    rollouts = {}
    try:
        for weights, checkpoint in (("base", base), ("trained", trained)):
            for name, candidate in texts.items():
                rollouts[weights, name] = play(rollouter, policy, checkpoint, candidate, examples, k, on_rollout)
    finally:
        policy.handle.engine.load(trained)
    cells = {
        name_of(name, weights): estimate(played, k, rollouter.seed) for (weights, name), played in rollouts.items()
    }
    drift = {f"{name} instructions": drift_of(trained, base, rollouts["trained", name]) for name in texts}
    known = {name: moved for name, moved in drift.items() if moved is not None}
    return TwoByTwo(
        cells={name: cells[name] for name in CELLS},
        drift=known,
        problems_of_split=len(examples),
        k=k,
        weights=trained.version,
        candidate=evolved.digest,
        seed=rollouter.seed,
    )


def play(
    rollouter: Rollouter,
    policy: PolicyLM,
    checkpoint: Checkpoint,
    candidate: Candidate,
    examples: Sequence[dspy.Example],
    k: int,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
) -> list[Rollout]:
    """k rollouts of a candidate on each example, under these weights."""
    engine = policy.handle.engine
    if engine.weights != checkpoint.version:
        engine.load(checkpoint)
    tasks = [Task(Problem(i, example), candidate, s) for i, example in enumerate(examples) for s in range(k)]
    return rollouter.rollout(tasks, f"evaluation {checkpoint.version}", on_rollout)


def drift_of(trained: Checkpoint, base: Checkpoint, rollouts: Sequence[Rollout]) -> Drift | None:
    """KL(trained || base) on the calls of these rollouts of the trained weights; None when all calls were greedy."""
    measured = [rollout for rollout in rollouts if rollout.reward is not None]
    calls = [call for rollout in measured for call in rollout.calls if call.temperature > 0]
    if not calls:
        return None
    from dspy_fst.engine.lora import read

    adapter = read(trained.adapters[0].path)[0] if len(trained.adapters) > 1 else None  # one alone is merged
    settings = TrainingSettings(adapter=adapter)
    trainer = Trainer(trained.folder, settings, reference=base.folder, adapters=trained.predictors)
    by_call: list[list[float]] = trainer.kl_by_call(calls)
    total = math.fsum(math.fsum(values) for values in by_call)
    return Drift(per_token=total / sum(map(len, by_call)), per_rollout=total / len(measured))


def keep(run_dir: Path, results: Sequence[Mapping[str, object]]) -> None:
    """Append results to a run's evaluations, one line each, all or none. Several processes may do so at once.

    Raises:
        DiskError: the disk refused.
    """
    path = run_dir / EVALUATIONS
    lines = "".join(json.dumps(to_jsonable(result), allow_nan=False) + "\n" for result in results).encode()
    with writing(run_dir), path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        whole = file.seek(0, os.SEEK_END)
        if whole:
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else b"\n" + lines  # an incomplete last line must not swallow ours
        try:
            if file.write(lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), whole)
            raise
