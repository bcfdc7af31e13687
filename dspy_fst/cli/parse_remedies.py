"""`dspy-fst check --measure` where hardly any reply parses: the remedy, tried on this very model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import dspy

    from dspy_fst.config import FSTConfig
    from dspy_fst.policy_lm import PolicyLM
    from dspy_fst.rollout.rollouter import Rollouter
    from dspy_fst.types import Population, Rollout


@dataclass(frozen=True)
class _TrialInputs:
    """As much of a run as a trial of other forms needs (`dspy_fst.training.parse_trial.Subject`)."""

    program: "dspy.Module"
    trainset: "Sequence[dspy.Example]"
    population: "Population"
    policy: "PolicyLM"
    config: "FSTConfig"
    rollouter: "Rollouter"


def remedies(
    rollouts: "Sequence[Rollout]",
    rollouter: "Rollouter",
    trainset: "Sequence[dspy.Example]",
    policy: "PolicyLM",
    config: "FSTConfig",
) -> list[str]:
    """What helps where fewer than half of the replies parse, as a run would find it; empty where they do.

    Args:
        rollouts: That were measured.
        rollouter: Of these rollouts; its engine still runs.
        trainset: Its examples are tried, and shown as demos.
        policy: What the program speaks with.
        config: The recipe; ``parse_trial`` says how many rollouts each form gets, and 0 tries none.
    """
    from dspy_fst.monitoring.form_advice import Form, form_advice
    from dspy_fst.rollout.components import read_texts
    from dspy_fst.rollout.summaries import failed_reply_of
    from dspy_fst.training.first_rollouts import HARDLY
    from dspy_fst.training.parse_trial import announced, parse_share, trial
    from dspy_fst.types import Population

    share = parse_share(rollouts)
    if share is None or share >= HARDLY:
        return []
    reply = failed_reply_of(rollouts)
    if not config.parse_trial:
        return [f"{share:.0%} of the replies parse. {reply}. {form_advice(Form())}"]
    typer.echo(announced(rollouter.program, trainset, config.parse_trial), err=True)
    population = Population.of_seed(read_texts(rollouter.program), 1)
    found = trial(_TrialInputs(rollouter.program, trainset, population, policy, config, rollouter), share)
    return [f"{reply}; {found.told()}" if reply else found.told()]


def measured_warnings(time: dict[str, Any] | None) -> Iterator[str]:
    """What the sampled rollouts say of the program."""
    if time is not None:
        yield from time["remedies"]
        lost = ", ".join(f"{reason}: {count}" for reason, count in time["lost"].items())
        if lost and not time["remedies"]:
            yield f"of {time['rollouts'] + 1} rollouts that were sampled some failed or measured nothing ({lost})"
