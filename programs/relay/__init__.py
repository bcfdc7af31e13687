"""Relay: two predictors in a row, each of which has to do a hidden operation to a list of digits."""

from programs.common import Task
from programs.lab import build as build_lab
from programs.lab.operations import BY_NAME
from programs.lab.world import World, operations
from programs.relay.program import Metric, Relay

__all__ = ["build"]


def build(
    train: int = 512,
    val: int = 64,
    test: int = 128,
    seed: int = 0,
    *,
    first: str = "rotate_left",
    second: str = "swap_ends",
    vague: float = 0.5,
) -> Task:
    """Draw different lists and what two operations make of them, for the laboratory's base model.

    Args:
        first: What the first predictor has to do: a name in `programs.lab.operations`; `second` likewise.
        vague: Share of the problems whose feedback hides what was expected.

    Raises:
        ValueError: no such operation.
    """
    for what, name in (("first", first), ("second", second)):
        if name not in BY_NAME:
            raise ValueError(f"{what}={name!r}: take one of {', '.join(BY_NAME)}")
    world = World(f"relay-{first}-{second}", operations(first, second), told="")
    lab = build_lab(world, seed, train=train, val=val, test=test)
    metric = Metric(operations(first), operations(second), vague)
    return Task(Relay(world.seed_instruction), metric, lab.trainset, lab.valset, lab.testset)
