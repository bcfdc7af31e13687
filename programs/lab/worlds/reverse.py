"""One operation, which the base model knows when it is told: text alone goes a long way."""

from programs.lab.world import World, operations

WORLD = World(name="reverse", answer=operations("reverse"), told="Reverse the list.")
