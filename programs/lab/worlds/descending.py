"""One operation that the base does badly even when told, and that is hard to learn: a ceiling that is not soon reached."""

from programs.lab.world import World, operations

WORLD = World(name="descending", answer=operations("descending"), told="Sort downwards.")
