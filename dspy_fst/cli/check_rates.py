"""`dspy-fst check --measure`: a few rollouts on an engine of its own, and the rates that they give.

In: an opened project. Out: `Rates`. The engine is released at the end, and nothing is written.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, TypedDict

import typer

from dspy_fst.cli.parse_remedies import remedies
from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.numbers import duration

if TYPE_CHECKING:
    from dspy_fst.config import FSTConfig
    from dspy_fst.project.project_file import Opened
    from dspy_fst.rollout.rollouter import Rollouter
    from dspy_fst.types import Rollout

SAMPLED = 8
"""Rollouts in flight while the rates are measured (ours). Few: a check must not cost what it is meant to predict."""


class Rates(TypedDict):
    """What was measured, and what the planned rollouts would take at these rates."""

    rollouts: int
    """Rollouts in flight together, e.g. 8."""
    engine_start_s: float
    """Seconds until the engine had answered its first call, which is slower than any other."""
    alone_s: float
    """Seconds of one rollout by itself."""
    together_s: float
    """Seconds of all ``rollouts`` together."""
    scores: list[float]
    """Rewards that were measured."""
    mean_score: float
    lost: Mapping[str, int]
    """Reason -> rollouts that failed or were masked."""
    calls_per_rollout: float
    tokens_per_rollout: float
    planned_rollouts: int
    """Rollouts of the whole plan, at most."""
    remedies: list[str]
    """What helps where hardly any reply parses; else empty."""
    sampling_s: list[float]
    """Seconds to sample and score the planned rollouts: the lower and the upper end."""


def measure_rates(opened: "Opened", config: "FSTConfig", planned_rollouts: int) -> Rates:
    """Time a few rollouts on an engine of its own: one alone, then some together.

    Raises:
        ConfigurationError: the program or its metric cannot be measured.
        EngineError: the engine does not start.
    """
    from dspy_fst.preflight.model_checks import context_faults
    from dspy_fst.preflight.program_checks import policies_of
    from dspy_fst.training.opening import open_rollouter, trainable_copy

    typer.echo("starting the engine", err=True)
    policy = next(iter(policies_of(opened.program).values())).fork()
    try:
        began = monotonic()
        policy.handle.ready()
        program = trainable_copy(opened.program, policy)
        rollouter = open_rollouter(
            program, opened.optimizer.metric, config, policy.handle.engine.expect, opened.trainset
        )
        _timed(rollouter, opened, 1)  # the first call of an engine is slower than any other
        start_s = monotonic() - began
        alone_s, _ = _timed(rollouter, opened, 1)
        together_s, rollouts = _timed(rollouter, opened, SAMPLED)
        helps = remedies(rollouts, rollouter, opened.trainset, policy, config)
    finally:
        policy.release()
    if faults := [*context_faults(policy, rollouts, config.demo_tokens), *_unmeasured(rollouts)]:
        raise ConfigurationError(faults)
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "rollouts": len(rollouts),
        "engine_start_s": start_s,
        "alone_s": alone_s,
        "together_s": together_s,
        "scores": rewards,
        "mean_score": sum(rewards) / len(rewards),
        "lost": Counter(rollout.outcome.reason for rollout in rollouts if rollout.outcome.reason),
        "calls_per_rollout": sum(len(rollout.calls) for rollout in rollouts) / len(rollouts),
        "tokens_per_rollout": sum(rollout.tokens for rollout in rollouts) / len(rollouts),
        "planned_rollouts": planned_rollouts,
        "remedies": helps,
        "sampling_s": sorted([planned_rollouts * together_s / len(rollouts), planned_rollouts * alone_s]),
    }


def _timed(rollouter: "Rollouter", opened: "Opened", count: int) -> "tuple[float, list[Rollout]]":
    """Seconds that rollouts of the first examples take together, and the rollouts."""
    from dspy_fst.rollout.components import read_texts
    from dspy_fst.rollout.rollouter import Task
    from dspy_fst.types import Problem

    seed = read_texts(opened.program)
    examples = opened.trainset[:count]
    tasks = [Task(Problem(index, example), seed) for index, example in enumerate(examples)]
    began = monotonic()
    rollouts = rollouter.rollout(tasks, f"check {count}")
    return monotonic() - began, rollouts


def _unmeasured(rollouts: "Sequence[Rollout]") -> Iterator[str]:
    from dspy_fst.outcomes.outcome import OutcomeCounts

    masks = OutcomeCounts.over(rollout.outcome for rollout in rollouts).masked
    if masks.total() == len(rollouts) or any(reason.startswith("metric") for reason in masks):
        detail = next(rollout.feedback for rollout in rollouts if rollout.mask)
        yield (
            f"{masks.total()} of {len(rollouts)} rollouts cannot be measured ({', '.join(sorted(masks))})"
            f"{f': {detail}' if detail else ''}; run the program and its metric on one example by hand"
        )


def rate_warnings(rates: Rates | None) -> Iterator[str]:
    """What the sampled rollouts reveal about the program."""
    if rates is not None:
        yield from rates["remedies"]
        lost = _reasons(rates)
        if lost and not rates["remedies"]:
            yield f"of {rates['rollouts'] + 1} rollouts that were sampled some failed or measured nothing ({lost})"


def rate_lines(rates: Rates) -> Iterator[str]:
    """The time that the planned rollouts may take, and the measurement it follows from."""
    low, high = rates["sampling_s"]
    count = rates["rollouts"]
    yield (
        f"sampling and scoring {rates['planned_rollouts']:,} rollouts may take {duration(low)} to {duration(high)}, "
        f"by the rates of one alone and of {count} together; with more in flight it may be faster. Weight updates, "
        "publishing and reflections come on top and were not measured."
    )
    yield (
        f"measured: engine ready after {duration(rates['engine_start_s'])}, one rollout {rates['alone_s']:.2f} s, "
        f"{count} together {rates['together_s']:.2f} s; {rates['calls_per_rollout']:.1f} calls and "
        f"{rates['tokens_per_rollout']:.0f} tokens a rollout; mean score {rates['mean_score']:.3f}; "
        f"failed: {_reasons(rates) or 'none'}"
    )


def _reasons(rates: Rates) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in rates["lost"].items())
