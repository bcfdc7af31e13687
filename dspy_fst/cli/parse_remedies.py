"""`dspy-fst check --measure` where hardly any reply parses: other forms of prompt, tried on this model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import dspy

    from dspy_fst.config import FSTConfig
    from dspy_fst.policy_lm import PolicyLM
    from dspy_fst.rollout.rollouter import Rollouter
    from dspy_fst.types import Population, Rollout


@dataclass(frozen=True)
class _TrialInputs:
    """The part of a run that a trial of other prompt forms needs (see `dspy_fst.training.parse_trial`)."""

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
    """What a run would advise where fewer than half of the replies parse; empty where more do.

    Args:
        rollouts: Rollouts that were measured.
        rollouter: What made these rollouts. Its engine must still run.
        trainset: Examples to try and to show as demos.
        policy: The LM of the program.
        config: The recipe. ``parse_trial`` is the number of rollouts for each form; 0 tries none.
    """
    from dspy_fst.monitoring.rules import Form, form_advice
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
    result = trial(_TrialInputs(rollouter.program, trainset, population, policy, config, rollouter), share)
    return [f"{reply}; {result.told()}" if reply else result.told()]
