"""A composition that the base does badly even when told, and never by itself: only text *and* training bring it."""

from programs.lab.world import World, operations

WORLD = World(
    name="ends_decrement",
    answer=operations("ends", "decrement"),
    told="Keep only the two ends, then subtract one from each number.",
)
