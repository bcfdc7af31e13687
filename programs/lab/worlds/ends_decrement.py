"""A composition that pretraining never stated and no guess hits: training has nothing to start from without text."""

from programs.lab.world import World, operations

WORLD = World(
    name="ends_decrement",
    answer=operations("ends", "decrement"),
    told="Keep only the two ends, then subtract one from each number.",
)
