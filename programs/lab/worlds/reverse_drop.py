"""The main world: a composition that the base manages middling well when told, so that text and training both help."""

from programs.lab.world import World, operations

WORLD = World(
    name="reverse_drop",
    answer=operations("reverse", "drop_last"),
    told="Reverse the list, then drop the last number.",
)
